"""Two nodes' agents share one bucket: its limits hold, and pins apply to every node's disk."""

import time
from collections.abc import Callable
from pathlib import Path

from memkv_sglang.config.schema import AgentConfig, CollectorConfig, Config, MinioConfig, NvmeConfig
from memkv_sglang.engine.pins import PinWatcher
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.retention.pins import Pin, PinStore
from memkv_sglang.tiers.nvme import NvmeTier
from tests.collector.bucket import LIMIT, PAGE, Bucketful
from tests.nodes.node import Node, Pool

NAMESPACE = make_namespace(PAGE)


class CollectingNode(Node):
    """A node whose agent collects every second."""

    def __init__(self, name: str, home: Path, minio: MinioConfig, capacity: int) -> None:
        from memkv_sglang.client.client import AgentClient

        home = home / name
        self.config = Config(
            agent=AgentConfig(socket=str(home / "run" / "agent.sock"), drain_timeout=1.0),
            nvme=NvmeConfig(directory=str(home / "pages"), capacity=64 << 20),
            minio=minio,
            collector=CollectorConfig(capacity=capacity, interval=1, use_period=1),
        )
        self.client = AgentClient(self.config, start=True)
        assert self.client.wait(LIMIT), self.client.problem

    def spill(self, chain: Chain) -> None:
        pool = Pool(self.client, chain, PAGE)
        pool.fill()
        assert {result.name for result in pool.spill()} <= {"STORED", "PRESENT"}
        assert self.client.flush(LIMIT)


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up, "it did not come to be so"
        time.sleep(0.1)


def test_the_bucket_stays_within_its_capacity(bucketful: Bucketful, tmp_path: Path) -> None:
    chains = [make_chain(NAMESPACE, 40, str(i)) for i in range(4)]
    with (
        CollectingNode("one", tmp_path, bucketful.config, 50 * PAGE) as one,
        CollectingNode("two", tmp_path, bucketful.config, 50 * PAGE) as two,
    ):
        one.client.describe(NAMESPACE)
        for i, chain in enumerate(chains):
            (one, two)[i % 2].spill(chain)
        wait_until(lambda: sum(sum(bucketful.there(chain)) for chain in chains) <= 50)
        for node in (one, two):  # both report the last collection of either node
            wait_until(lambda node=node: 0 < _pages_in_minio(node) <= 50)  # type: ignore[misc]
    assert sum(sum(bucketful.there(chain)) for chain in chains) > 0


def _pages_in_minio(node: Node) -> int:
    report = node.client.status()
    assert report is not None
    return next(tier.pages for tier in report.engine.tiers if tier.name == "minio")


def test_pinned_pages_are_kept_on_disk_too(bucketful: Bucketful, tmp_path: Path) -> None:
    nvme = NvmeTier(NvmeConfig(directory=str(tmp_path), capacity=4 << 20, segment_size=1 << 20))
    pinned = make_chain(NAMESPACE, 20, "pinned")
    PinStore(*bucketful.tier.access.control()).add(
        Pin(
            namespaces=[NAMESPACE.digest.hex()],
            hashes=[page.hex() for page in pinned.hashes],
            seconds=3600,
        )
    )
    watcher = PinWatcher(bucketful.tier, nvme)
    try:
        wait_until(lambda: bool(nvme._catalog.exempt))
        _fill(nvme, pinned)
        others = [make_chain(NAMESPACE, 200, str(i)) for i in range(6)]
        for chain in others:
            _fill(nvme, chain)
        assert nvme.usage().evicted > 0
        assert all(nvme.present(pinned.keys(), time.monotonic() + LIMIT))
        nvme.exempt(frozenset())
        for chain in others:
            _fill(nvme, chain)
        assert not all(nvme.present(pinned.keys(), time.monotonic() + LIMIT))
    finally:
        watcher.close()
        nvme.close()


def _fill(nvme: NvmeTier, chain: Chain) -> None:
    from memkv_sglang.testing.pages import make_page

    pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
    results = nvme.spill(pages, time.monotonic() + LIMIT)
    assert all(result.name in ("STORED", "PRESENT") for result in results)


def test_two_servers_of_a_node_share_one_budget(bucketful: Bucketful, tmp_path: Path) -> None:
    with Node("node", tmp_path, bucketful.config, capacity=4 << 20) as node:
        other = node.connect()
        try:
            for i in range(6):
                chain = make_chain(NAMESPACE, 200, str(i))
                pool = Pool((node.client, other)[i % 2], chain, PAGE)
                pool.fill()
                pool.spill()
                for client in (node.client, other):
                    report = client.status()
                    assert report is not None
                    held = next(t for t in report.engine.tiers if t.name == "nvme")
                    assert held.bytes <= 4 << 20
            files = (tmp_path / "node" / "pages").rglob("*.seg")
            assert sum(path.stat().st_size for path in files) <= 4 << 20
        finally:
            other.close()


def test_a_reader_node_spills_to_its_disk_and_loads_from_the_bucket(
    bucketful: Bucketful, reader_config: MinioConfig, tmp_path: Path
) -> None:
    theirs = bucketful.spill("theirs", 4)
    own = make_chain(NAMESPACE, 4, "own")
    with Node("reader", tmp_path, reader_config) as node:
        pool = Pool(node.client, own, PAGE)
        pool.fill()
        assert {result.name for result in pool.spill()} == {"STORED"}
        assert node.client.flush(LIMIT)  # pages that cannot be uploaded do not delay this
        # Possible once the bucket is open.
        wait_until(lambda: node.client.lookup(theirs).length == 4)
        shared = Pool(node.client, theirs, PAGE)
        assert [load.tier for load in shared.load()] == ["minio"] * 4
        assert shared.wrong(4) == []
    assert not any(bucketful.there(own))


def test_a_tier_closes_while_it_collects(bucketful: Bucketful) -> None:
    from prometheus_client import CollectorRegistry

    from memkv_sglang.metrics import Metrics

    bucketful.spill("chain", 3)
    registry = CollectorRegistry()
    tier = MinioTier(bucketful.config)
    tier.keep_limits(CollectorConfig(capacity=PAGE, interval=1, use_period=1), Metrics(registry))
    try:
        done = {"result": "done"}
        wait_until(lambda: registry.get_sample_value("memkv_collections_total", done) == 1)
        assert tier.usage().evicted == 3
    finally:
        tier.close()
