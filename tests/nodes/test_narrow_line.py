"""On a node whose link to MinIO is slower than its GPU, pages that take longer to load are
skipped.
"""

import time
from pathlib import Path

import msgspec
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.tcp_proxy import TcpProxy

from memkv_sglang.config.schema import KIB, MinioConfig
from memkv_sglang.engine.recompute import Recompute
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult
from tests.nodes.node import LIMIT, Node, Pool

PAGE, PAGES = 256 * KIB, 32
LOAD_SECONDS = 1.5
"""Seconds to load these pages through the line."""

BUDGET = 30.0


def test_lookups_skip_pages_that_are_faster_to_compute(
    minio_server: MinioServer, tmp_path: Path
) -> None:
    minio = MinioConfig(
        endpoint=minio_server.endpoint,
        bucket="narrow-line",
        access_key=minio_server.access_key,
        secret_key=minio_server.secret_key,
    )
    namespace = make_namespace(page_bytes=PAGE, model="narrow")
    first, second = (make_chain(namespace, PAGES, seed) for seed in ("first", "second"))
    faster = Recompute(LOAD_SECONDS / PAGES / 4, PAGE)
    slower = Recompute(LOAD_SECONDS / PAGES * 4, PAGE)
    with TcpProxy(minio_server.host, minio_server.port) as proxy:
        far = msgspec.structs.replace(minio, endpoint=proxy.url)
        with Node("one", tmp_path, minio) as one, Node("narrow", tmp_path, far) as narrow:
            for chain in (first, second):
                pool = Pool(one.client, chain, PAGE)
                pool.fill()
                pool.spill()
            assert one.client.flush(LIMIT)
            proxy.rate = PAGE * PAGES / LOAD_SECONDS
            assert narrow.client.lookup(first, BUDGET, faster).length == PAGES, "not known yet"
            pool, began = Pool(narrow.client, first, PAGE), time.monotonic()
            assert {load.result for load in pool.load()} == {LoadResult.LOADED}
            assert time.monotonic() - began >= 0.9 * LOAD_SECONDS, "the line is not narrow"
            assert pool.wrong(PAGES) == []
            assert narrow.client.lookup(second, BUDGET, slower).length == PAGES
            assert narrow.client.lookup(second, BUDGET).length == PAGES
            assert narrow.client.lookup(second, BUDGET, faster).length == 0
            assert one.client.lookup(second, BUDGET, faster).length == PAGES, "its own disk is fast"
