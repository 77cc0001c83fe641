"""Two nodes with an agent each and one real MinIO: pages that one spills, the other loads bit for
bit.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import KIB, MIB, MinioConfig
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_hashes, make_namespace
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult
from tests.nodes.node import LIMIT, Node, Pool

BUDGET = 30.0


def loaded(tier: str, count: int) -> list[PageLoad]:
    return [PageLoad(LoadResult.LOADED, tier)] * count


@pytest.fixture(scope="module")
def minio(minio_server: MinioServer) -> MinioConfig:
    return MinioConfig(
        endpoint=minio_server.endpoint,
        bucket="two-nodes",
        access_key=minio_server.access_key,
        secret_key=minio_server.secret_key,
    )


@pytest.fixture(scope="module")
def nodes(minio: MinioConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    home = tmp_path_factory.mktemp("n")
    with Node("one", home, minio) as one, Node("other", home, minio) as other:
        yield [one, other]


def spill(node: Node, chain: Chain, page_bytes: int) -> None:
    pool = Pool(node.client, chain, page_bytes)
    pool.fill()
    assert pool.spill() == [SpillResult.STORED] * len(chain.hashes)
    assert node.client.flush(LIMIT)


def load(node: Node, chain: Chain, page_bytes: int, tier: str) -> None:
    pool = Pool(node.client, chain, page_bytes)
    assert pool.load() == loaded(tier, len(chain.hashes))
    assert pool.wrong(len(chain.hashes)) == []


def slow(*values: int) -> list[ParameterSet]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("length", [1, 128, 129, *slow(2, 127, 1000, 4096)])
def test_chains_of_any_length(nodes: list[Node], length: int) -> None:
    one, other = nodes
    namespace = make_namespace(page_bytes=4 * KIB, model="length")
    chain = make_chain(namespace, length, f"length {length}")
    spill(one, chain, 4 * KIB)
    assert other.client.lookup(chain, BUDGET) == Lookup(length, complete=True)
    load(other, chain, 4 * KIB, "minio")
    load(one, chain, 4 * KIB, "nvme")


@pytest.mark.parametrize("page_bytes", [4 * KIB, 10_000, 16 * MIB, *slow(64 * KIB, MIB)])
def test_pages_of_any_size(nodes: list[Node], page_bytes: int) -> None:
    one, other = nodes
    chain = make_chain(make_namespace(page_bytes=page_bytes), 4, f"size {page_bytes}")
    spill(one, chain, page_bytes)
    load(other, chain, page_bytes, "minio")
    load(one, chain, page_bytes, "nvme")


def test_every_prefix_of_a_diverging_chain(nodes: list[Node]) -> None:
    one, other = nodes
    namespace = make_namespace(page_bytes=4 * KIB, model="diverging")
    stored = make_chain(namespace, 65, "stored")
    spill(one, stored, 4 * KIB)
    for shared in range(66):
        branch = make_hashes(40, f"branch {shared}", stored.hashes[shared - 1] if shared else b"")
        chain = Chain(namespace.digest, [*stored.hashes[:shared], *branch])
        for node in nodes:
            assert node.client.lookup(chain, BUDGET) == Lookup(shared, complete=True)
        pool = Pool(other.client, Chain(namespace.digest, chain.hashes[: shared + 1]), 4 * KIB)
        results = [one_load.result for one_load in pool.load()]
        assert results == [LoadResult.LOADED] * shared + [LoadResult.MISSING]
        assert pool.wrong(shared) == []


def test_ten_clients_at_once(nodes: list[Node]) -> None:
    namespace = make_namespace(page_bytes=64 * KIB, model="crowd")
    shared = make_chain(namespace, 30, "shared")
    spill(nodes[0], shared, 64 * KIB)
    failures: list[BaseException] = []

    def converse(number: int) -> None:
        client = nodes[number % 2].connect()
        try:
            own = make_chain(namespace, 30, f"client {number}")
            for chain in (own, shared, own, shared):
                pool = Pool(client, chain, 64 * KIB)
                pool.fill()
                assert max(pool.spill()) <= SpillResult.PRESENT
                fresh = Pool(client, chain, 64 * KIB)
                assert [one.result for one in fresh.load()] == [LoadResult.LOADED] * 30
                assert fresh.wrong(30) == []
        except BaseException as error:  # the main thread reports it
            failures.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=converse, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_restarts_lose_nothing(minio_server: MinioServer, tmp_path: Path) -> None:
    """Restart the agent, MinIO, and both; pages spilled while MinIO is down arrive afterwards."""
    namespace = make_namespace(page_bytes=64 * KIB)
    first, second = (make_chain(namespace, 40, seed) for seed in ("first", "second"))
    with MinioServer(tmp_path / "data") as server:
        minio = MinioConfig(
            endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key
        )
        with Node("one", tmp_path, minio) as one, Node("other", tmp_path, minio) as other:
            spill(one, first, 64 * KIB)
            one.restart()
            load(one, first, 64 * KIB, "nvme")

            server.stop()
            pool = Pool(one.client, second, 64 * KIB)
            pool.fill()
            assert pool.spill() == [SpillResult.STORED] * 40
            assert one.client.lookup(second, BUDGET).length == 40
            assert other.client.lookup(first, BUDGET).length == 0

            one.restart()
            server.start()
            assert one.client.flush(LIMIT)
            other.restart()
            for chain in (first, second):
                assert other.client.lookup(chain, BUDGET) == Lookup(40, complete=True)
                load(other, chain, 64 * KIB, "minio")
                load(one, chain, 64 * KIB, "nvme")
