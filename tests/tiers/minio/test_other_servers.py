"""The tier on S3 servers other than MinIO: the conformance suite, an outage, and the commands."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import pytest
from memkv_testbed.other_servers import SeaweedServer, VersityServer
from memkv_testbed.s3_server import S3Server
from minio import Minio
from prometheus_client import CollectorRegistry

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.cli.main import main
from memkv_sglang.config.schema import MIB, Config, MinioConfig, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.probe import Conditions
from memkv_sglang.tiers.minio.retention.shards import LeaseHeldError, Shard
from tests.collector.bucket import Bucketful, prefix_length
from tests.tiers.minio import test_minio_conformance as on_minio
from tests.tiers.minio.conftest import OpenTier

# The first test of a class may build its server, which takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, func_only=True)]

PAGE = 4096
PAGES = 64
RACES = 5
NAMESPACE = make_namespace(PAGE)
CHAIN = make_chain(NAMESPACE, 1, "never stored")


def deadline() -> float:
    return time.monotonic() + 30


@pytest.fixture(scope="class")
def minio_server(request: pytest.FixtureRequest) -> Iterator[S3Server]:
    """The server of the test's class."""
    with request.cls.make_server() as server:
        yield server


def present_again(tier: MinioTier, keys: Sequence[PageKey]) -> list[bool]:
    """Ask until the tier, which avoids a failed server for a while, asks the server again."""
    end = deadline()
    while True:
        try:
            return tier.present(keys, end)
        except TierError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


class OnOtherServer(on_minio.TestMinioTier):
    """The tier contract, and what users rely on beyond it."""

    make_server: Callable[[], S3Server]

    def test_lookups_and_loads_of_a_chain(
        self, minio_config: MinioConfig, open_tier: OpenTier
    ) -> None:
        writer, reader = open_tier(minio_config), open_tier(minio_config)
        chain = make_chain(NAMESPACE, PAGES, "chain")
        pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
        assert writer.spill(pages, deadline()) == [SpillResult.STORED] * PAGES
        for _ in range(20):
            assert reader.present(chain.keys(), deadline()) == [True] * PAGES
            reader.invalidate(chain.keys())
        assert reader.lookup(chain, deadline()).length == PAGES
        empty = [make_page(key, [PAGE], filled=False) for key in chain.keys()]
        assert {result for result, _ in reader.fetch(empty, deadline())} == {LoadResult.LOADED}
        assert [bytes(page.buffers[0]) for page in empty] == [
            bytes(page.buffers[0]) for page in pages
        ]

    def test_pages_survive_an_outage(
        self, minio_config: MinioConfig, minio_server: S3Server, open_tier: OpenTier
    ) -> None:
        tier = open_tier(minio_config)
        chain = make_chain(NAMESPACE, 8, "outage")
        pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
        assert tier.spill(pages, deadline()) == [SpillResult.STORED] * len(pages)
        tier.invalidate(chain.keys())
        minio_server.kill()
        try:
            with pytest.raises(TierError):
                tier.present(chain.keys(), time.monotonic() + 2)
            empty = [make_page(key, [PAGE], filled=False) for key in chain.keys()]
            missed = tier.fetch(empty, time.monotonic() + 2)
            assert LoadResult.LOADED not in {result for result, _ in missed}
        finally:
            minio_server.start()
        assert present_again(tier, chain.keys()) == [True] * len(pages)
        assert {result for result, _ in tier.fetch(empty, deadline())} == {LoadResult.LOADED}

    def test_a_backlog_drains_after_an_outage(
        self,
        minio_config: MinioConfig,
        minio_server: S3Server,
        open_tier: OpenTier,
        tmp_path: Path,
    ) -> None:
        other = open_tier(minio_config)
        other.check(deadline())
        nvme = NvmeConfig(directory=str(tmp_path / "nvme"), capacity=64 * MIB)
        settings = Config(nvme=nvme, minio=minio_config)
        engine = build_engine(settings, CollectorRegistry())
        try:
            minio_server.kill()
            chain = make_chain(NAMESPACE, PAGES, "backlog")
            pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
            assert engine.spill(pages) == [SpillResult.STORED] * PAGES
            assert not engine.flush(1)
            minio_server.start()
            assert engine.flush(60)
            assert present_again(other, chain.keys()) == [True] * PAGES
        finally:
            minio_server.start()
            engine.close(drain=0)

    def test_a_collection_keeps_the_limit_and_removes_leaves_first(
        self, minio_config: MinioConfig, minio_server: S3Server, open_tier: OpenTier
    ) -> None:
        tier = open_tier(minio_config)
        client = Minio(minio_config.endpoint.partition("://")[2], *minio_server.root, secure=False)
        bucketful = Bucketful(minio_config, tier, client)
        assert present_again(tier, CHAIN.keys()) == [False]
        chain = bucketful.spill("collected", 32)
        assert bucketful.collect(capacity=16 * PAGE).satisfied
        assert 8 <= prefix_length(bucketful.there(chain)) <= 16

    def test_one_of_two_concurrent_nodes_gets_the_lease(
        self, minio_config: MinioConfig, open_tier: OpenTier
    ) -> None:
        nodes = [open_tier(minio_config), open_tier(minio_config)]

        def acquire(shard: Shard) -> bool:
            try:
                shard.acquire()
            except LeaseHeldError:
                return False
            return True

        with ThreadPoolExecutor(len(nodes)) as threads:
            for _ in range(RACES):
                shards = []
                for node in nodes:
                    bucket, records, names = node.access.control()
                    shards.append(Shard(records, bucket, names, 0, 60))
                held = list(threads.map(acquire, shards))
                assert sum(held) == 1
                assert not acquire(shards[held.index(False)])
                shards[held.index(True)].release()

    def test_doctor_and_setup_pass(
        self, minio_config: MinioConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("endpoint", "bucket", "prefix", "access_key", "secret_key"):
            monkeypatch.setenv(f"MEMKV_MINIO_{name.upper()}", getattr(minio_config, name))
        assert main(["bucket", "setup"]) == 0
        assert main(["doctor", "--collector-capacity", "1TiB"]) == 0
        monkeypatch.setenv("MEMKV_MINIO_SECRET_KEY", "another-secret")
        assert main(["doctor"]) == 1

    def test_no_policy_is_added_where_there_are_none(
        self,
        minio_config: MinioConfig,
        minio_server: S3Server,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        for name in ("endpoint", "bucket", "prefix", "access_key", "secret_key"):
            monkeypatch.setenv(f"MEMKV_MINIO_{name.upper()}", getattr(minio_config, name))
        assert main(["bucket", "setup", "--add-policies"]) == 1
        assert "`memkv bucket policy` prints them" in capfd.readouterr().err
        client = Minio(minio_config.endpoint.partition("://")[2], *minio_server.root, secure=False)
        # Such a server takes the admin API's path for an object's.
        assert not client.bucket_exists("minio")


class TestSeaweedFS(OnOtherServer):
    make_server = SeaweedServer

    def test_what_it_supports(self, minio_config: MinioConfig, open_tier: OpenTier) -> None:
        support = open_tier(minio_config).access.support(deadline())
        assert support.conditions is Conditions.QUOTED
        assert support.copy_renews
        assert support.keep_alive


class TestVersitygw(OnOtherServer):
    """With its default, which closes each connection after one response."""

    make_server = VersityServer

    def test_what_it_supports(self, minio_config: MinioConfig, open_tier: OpenTier) -> None:
        support = open_tier(minio_config).access.support(deadline())
        assert support.conditions is Conditions.QUOTED
        assert not support.copy_renews
        assert not support.keep_alive

    def test_setup_names_the_right_region(
        self, minio_config: MinioConfig, open_tier: OpenTier
    ) -> None:
        tier = open_tier(msgspec.structs.replace(minio_config, region="eu-west-9"))
        with pytest.raises(TierError, match=r"set minio\.region to us-east-1"):
            tier.check(deadline())


class TestVersitygwWithKeepAlive(OnOtherServer):
    make_server = partial(VersityServer, keep_alive=True)
