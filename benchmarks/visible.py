"""Measure the time from the start of a spill until another node's lookup finds the chain."""

import tempfile
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from prometheus_client import CollectorRegistry

from benchmarks.peers.base import demand
from benchmarks.peers.ours import Ours
from benchmarks.pool import HostPool
from benchmarks.report import Measure, Report
from benchmarks.servers import Minio
from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.schema import GIB, MIB, Config, NvmeConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.minio import MinioTier

PAGES = 128

SEEN, PUT = "memkv: spill until seen", "PUT directly"

LIMIT = 60.0
"""Seconds for an upload."""


def measure_visible(report: Report, server: Minio, directory: Path, repetitions: int) -> None:
    """Spill a chain on a node with NVMe and MinIO, and compare that with direct PUTs of the pages.

    The other node looks up each chain only once, so its presence cache is cold.
    """
    config = server.config("visible")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=directory))
        pool = stack.enter_context(HostPool(PAGES, MIB, huge=True))
        pool.fill()
        nvme = NvmeConfig(directory=scratch, capacity=4 * GIB)
        here = build_engine(Config(nvme=nvme, minio=config), CollectorRegistry())
        stack.callback(here.close, 0)
        there = build_engine(Config(minio=config), CollectorRegistry())
        stack.callback(there.close, 0)
        direct = Ours(MinioTier(config))
        stack.callback(direct.close)
        namespace = make_namespace(page_bytes=MIB)
        direct.lookup(make_chain(namespace, 1, "opens the bucket"))
        here.describe(namespace)

        numbers = count()

        def spill_until_seen() -> float:
            chain = make_chain(namespace, PAGES, f"seen {next(numbers)}")
            return _until_seen(here, there, pool, chain)

        def put() -> float:
            chain = make_chain(namespace, PAGES, f"put {next(numbers)}")
            pages = pool.place(chain.keys())
            began = time.perf_counter()
            direct.spill(pages)
            return time.perf_counter() - began

        spill_until_seen()  # opens the connections, and creates the disk's first segment
        contestants: dict[str, Measure] = {SEEN: spill_until_seen, PUT: put}
        report.compete("visible", contestants, repetitions)
    ratio = report.ratio("visible", SEEN, PUT)
    report.figures["spill_visible_over_direct_put"] = ratio


def _until_seen(here: Engine, there: Engine, pool: HostPool, chain: Chain) -> float:
    began = time.perf_counter()
    results = here.spill(pool.place(chain.keys()))
    demand(set(results) == {SpillResult.STORED}, "spill")
    # Look up only once, at the end: polling would use time of the server, which is measured.
    demand(here.flush(LIMIT), "upload")
    demand(there.lookup(chain).length == PAGES, "lookup of uploaded pages")
    return time.perf_counter() - began
