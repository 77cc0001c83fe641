"""A MinIO with several drives or servers keeps its pages when it loses one."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from memkv_testbed.faults.node import wait_until
from memkv_testbed.minio_drives import DrivesServer, TwoServers
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier

NAMESPACE = make_namespace(page_bytes=sum(LENGTHS))
STORED = [SpillResult.STORED] * 8
KEPT = {SpillResult.STORED, SpillResult.PRESENT}


def chain(seed: str) -> Chain:
    return make_chain(NAMESPACE, 8, seed)


@contextmanager
def opened(endpoint: str, keys: MinioServer) -> Iterator[MinioTier]:
    config = MinioConfig(
        endpoint=endpoint,
        bucket=f"test-{uuid.uuid4().hex}",
        access_key=keys.access_key,
        secret_key=keys.secret_key,
        negative_ttl=0.0,
        stall_timeout=1.0,
    )
    tier = MinioTier(config)
    try:
        yield tier
    finally:
        tier.close()


def test_four_drives_without_one_keep_serving() -> None:
    with DrivesServer() as server, opened(server.endpoint, server) as tier:
        assert spill(tier, chain("before").keys()) == STORED
        server.remove_drive(2)
        load(tier, chain("before").keys())
        assert spill(tier, chain("without").keys()) == STORED
        load(tier, chain("without").keys())
        server.return_drive(2)
        load(tier, [*chain("before").keys(), *chain("without").keys()])


def test_two_servers_without_one_fail_softly() -> None:
    """Half of the drives are no quorum, so every page is a miss within the deadline."""
    with TwoServers() as pair, opened(pair.endpoint, pair.servers[0]) as tier:
        before = chain("before").keys()
        # Wait until the servers have found each other.
        wait_until(lambda: set(spill(tier, before)) <= KEPT)
        pair.servers[1].kill()
        for _ in range(5):
            began = time.monotonic()
            pages = [make_page(key, LENGTHS, filled=False) for key in before]
            results = tier.load(pages, began + 5)
            assert time.monotonic() - began < 6
            loaded = [p for p, r in zip(pages, results, strict=True) if r is LoadResult.LOADED]
            assert all(map(holds_content, loaded))
            assert LoadResult.CORRUPT not in results
            assert LoadResult.MISSING not in results
        fresh = [make_page(key, LENGTHS, filled=True) for key in chain("without").keys()]
        assert SpillResult.FAILED in tier.spill(fresh, time.monotonic() + 5)
        pair.restart_second()
        wait_until(lambda: loads_all(tier, before))
        wait_until(lambda: set(spill(tier, chain("without").keys())) <= KEPT)
        load(tier, chain("without").keys())


def loads_all(tier: MinioTier, keys: Sequence[PageKey]) -> bool:
    pages = [make_page(key, LENGTHS, filled=False) for key in keys]
    return set(tier.load(pages, soon())) == {LoadResult.LOADED}
