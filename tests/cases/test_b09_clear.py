"""A cleared namespace is empty, whatever calls were in flight."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from minio import Minio

from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from tests.nodes.node import LIMIT, Node, Pool

PAGE = 256 << 10
PAGES = 128
NAMESPACE = make_namespace(PAGE)


@pytest.fixture
def node(minio_config: MinioConfig, tmp_path: Path) -> Iterator[Node]:
    with Node("one", tmp_path, minio_config, capacity=256 * MIB) as node:
        node.client.describe(NAMESPACE)
        yield node


def pages_in_bucket(admin: Minio, bucket: str) -> int:
    if not admin.bucket_exists(bucket):
        return 0
    prefix = f"{NAMESPACE.digest.hex()}/"
    found = admin.list_objects(bucket, prefix=prefix, recursive=True)
    return sum(not (item.object_name or "").endswith(".json") for item in found)


def assert_empty(node: Node, admin: Minio, bucket: str, chain: Chain) -> None:
    assert node.client.flush(LIMIT)
    assert pages_in_bucket(admin, bucket) == 0
    assert node.client.lookup(chain, 5.0).length == 0
    assert node.client.present(chain, 5.0) == [False] * len(chain.hashes)


def test_clearing_during_uploads_leaves_nothing(
    node: Node, admin: Minio, minio_config: MinioConfig
) -> None:
    for turn in range(4):
        chain = make_chain(NAMESPACE, PAGES, f"uploads {turn}")
        pool = Pool(node.client, chain, PAGE)
        pool.fill()
        pool.spill()
        deadline = time.monotonic() + LIMIT
        # Wait until the first page has been uploaded.
        while not pages_in_bucket(admin, minio_config.bucket):
            assert time.monotonic() < deadline
        assert node.client.empty(NAMESPACE.digest, LIMIT)
        assert_empty(node, admin, minio_config.bucket, chain)
        # Pages spilled afterwards are stored and uploaded as usual.
    pool.spill()
    assert node.client.flush(LIMIT)
    assert pages_in_bucket(admin, minio_config.bucket) == PAGES
    assert {load.tier for load in pool.load()} == {"nvme"}
    assert pool.wrong(PAGES) == []


def test_clearing_during_spills_leaves_no_page_that_was_spilled_before(
    node: Node, admin: Minio, minio_config: MinioConfig
) -> None:
    chain = make_chain(NAMESPACE, PAGES, "spills")
    server = node.connect()
    pool = Pool(server, chain, PAGE)
    pool.fill()
    begun, over = threading.Event(), threading.Event()

    def spill() -> None:
        while not over.is_set():
            pool.spill()
            begun.set()

    thread = threading.Thread(target=spill)
    thread.start()
    try:
        assert begun.wait(LIMIT)
        for _ in range(3):
            assert node.client.empty(NAMESPACE.digest, LIMIT)
    finally:
        over.set()
        thread.join()
        server.close()
    assert node.client.empty(NAMESPACE.digest, LIMIT)
    assert_empty(node, admin, minio_config.bucket, chain)


def test_clearing_during_loads_and_warming_leaves_nothing_on_the_disk(
    node: Node, admin: Minio, minio_config: MinioConfig, tmp_path: Path
) -> None:
    chain = make_chain(NAMESPACE, PAGES, "loads")
    pool = Pool(node.client, chain, PAGE)
    pool.fill()
    pool.spill()
    assert node.client.flush(LIMIT)
    with Node("two", tmp_path, minio_config, capacity=256 * MIB) as other:
        helpers = [other.connect(), other.connect()]
        pools = [Pool(helper, chain, PAGE) for helper in helpers]
        begun = threading.Barrier(3, timeout=LIMIT)

        def load() -> None:
            begun.wait()
            for _ in range(2):  # a page is promoted at its second load
                pools[0].load()

        def warm() -> None:
            begun.wait()
            helpers[1].warm(chain, LIMIT)

        threads = [threading.Thread(target=work) for work in (load, warm)]
        for thread in threads:
            thread.start()
        begun.wait()
        assert other.client.empty(NAMESPACE.digest, LIMIT)
        for thread in threads:
            thread.join()
        assert_empty(other, admin, minio_config.bucket, chain)
        for helper in helpers:
            helper.close()
