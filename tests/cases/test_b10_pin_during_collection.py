"""A pin or a use during a collection keeps the pages, and a collection ends when it loses its
lease.
"""

import threading
import time
from collections.abc import Iterator

import pytest
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.retention import collector as collecting
from memkv_sglang.tiers.minio.retention import shard_pass
from memkv_sglang.tiers.minio.retention.shards import Shard
from tests.cases.s3_servers import bucket_of
from tests.cli.cli_node import Run
from tests.cli.conftest import environ, run  # noqa: F401 - fixtures
from tests.collector.bucket import LIMIT, NAMESPACE, PAGE, Bucketful, deadline, limits
from tests.collector.test_collect import pin


@pytest.fixture
def full(minio_config: MinioConfig, minio_server: MinioServer) -> Iterator[Bucketful]:
    with bucket_of(minio_config, minio_server) as found:
        yield found


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pass, "REMOVERS", 1)
    monkeypatch.setattr(collecting, "REMOVED_AT_ONCE", 4)


def chain_in_one_shard(full: Bucketful, count: int) -> Chain:
    """Store pages of one shard, so that batches are full."""
    hashes = [bytes(1) + page[1:] for page in make_chain(NAMESPACE, count, "one shard").hashes]
    chain = Chain(NAMESPACE.digest, hashes)
    pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
    assert set(full.tier.spill(pages, deadline())) == {SpillResult.STORED}
    full.tier.record_access(chain, range(len(chain.hashes)))
    assert full.tier.flush_accesses(LIMIT)
    return chain


@pytest.mark.parametrize("after", [0, 4, 8])
def test_a_pin_made_in_mid_collection_keeps_its_pages(full: Bucketful, after: int) -> None:
    chain = chain_in_one_shard(full, 12)
    there: list[list[bool]] = []

    def step(what: str, done: int, _total: int | None) -> None:
        if what == "removed" and done == after and not there:
            there.append(full.there(chain))
            pin(full, chain, 3600)

    collection = full.collector(capacity=1, use_period=1).collect(step)
    assert full.there(chain) == there[0]
    assert collection.report.removed_pages == after
    assert not collection.satisfied


def test_a_page_used_in_mid_collection_stays(full: Bucketful) -> None:
    chain = chain_in_one_shard(full, 8)
    used = Chain(chain.namespace, sorted(chain.hashes)[4:])  # none of these is in the first batch
    other = MinioTier(full.config)

    def step(what: str, done: int, _total: int | None) -> None:
        if what == "removed" and done == 0:
            other.record_access(used)
            assert other.flush_accesses(LIMIT)

    try:
        other.check(deadline())
        full.collector(capacity=1, use_period=1).collect(step)
    finally:
        other.close()
    assert all(full.there(used))
    assert sum(full.there(chain)) == 4


def test_a_lost_lease_ends_the_removal_before_the_next_batch(full: Bucketful) -> None:
    """The node that collects pauses between two batches for longer than its lease."""
    chain = chain_in_one_shard(full, 12)
    collector = full.tier.retention.collector(limits(capacity=1, use_period=1, lease_ttl=5))
    bucket, records, names = full.tier.access.control()
    other = Shard(records, bucket, names, 0, 5)

    def step(what: str, done: int, _total: int | None) -> None:
        if what == "removed" and done == 4:
            collector._shards[0]._renewed -= 5  # as if the last renewal were 5 s older
            give_up = time.monotonic() + LIMIT
            while other.read():
                assert time.monotonic() < give_up
                time.sleep(0.1)
            other.acquire()
            raise_at.append(done)

    raise_at: list[int] = []
    while collector.look().current.phase == "done" and collector.begin():
        pass
    while not raise_at:
        collector.advance(step)
        collector.look()
        time.sleep(0.1)
    assert sum(full.there(chain)) == 8
    other.renew()
    other.release()


def test_two_collectors_at_once_remove_each_page_once(full: Bucketful) -> None:
    chain = full.spill("chain", 24)
    second = MinioTier(full.config)
    try:
        assert second.lookup(chain, deadline()).length == 24
        settings = limits(capacity=10 * PAGE, use_period=1)
        collectors = [tier.retention.collector(settings) for tier in (full.tier, second)]
        threads = [
            threading.Thread(target=collector.collect, args=(lambda *_: None,))
            for collector in collectors
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
    finally:
        second.close()
    # 95 % of the capacity, which a single collection leaves as well
    assert sum(full.there(chain)) == 9


def test_pin_reports_missing_pages(full: Bucketful, run: Run) -> None:  # noqa: F811
    chain = full.spill("chain", 6)
    full.tier.describe(NAMESPACE)
    full.tier.remove(chain.keys()[4:])
    hashes = ",".join(page.hex() for page in chain.hashes)
    outcome = run("pin", "--chain", hashes, "--for", "1h")
    assert outcome.status == 0
    assert "2 of 6 pages are not in the bucket, starting with page 4" in outcome.err
    assert chain.hashes[4].hex() in outcome.err


def test_pin_waits_for_a_removal_that_has_not_seen_it(
    full: Bucketful,
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pin checks its pages only after it has been written, and reports the missing ones."""
    chain = full.spill("chain", 4)
    full.tier.describe(NAMESPACE)
    collector = full.collector(capacity=1, use_period=1)
    collector.look()
    collector.begin()
    assert collector.advance(lambda *_: None)
    assert collector.look().current.phase == "remove"
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        full.tier.remove(chain.keys())

    monkeypatch.setattr("memkv_sglang.cli.pin.time.sleep", sleep)
    outcome = run("pin", "--chain", ",".join(page.hex() for page in chain.hashes), "--for", "1h")
    assert waited == [shard_pass.REMOVE_SECONDS]
    assert "4 of 4 pages are not in the bucket" in outcome.err
