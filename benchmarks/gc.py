"""Measure how long the collector takes to empty a full bucket."""

import tempfile
import time
from contextlib import closing
from pathlib import Path

from memkv_testbed.minio_server import MinioServer
from rich.progress import Progress

from benchmarks.base import Options
from benchmarks.report import Report
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.minio import MinioTier

PAGES = 100_000
QUICK_PAGES = 5_000
PAGE_BYTES = 1024
"""Deletion does not depend on the content."""

CHAIN = 1000
"""Pages of a chain. The collector sorts chains, because leaves are deleted before roots."""

LEFT = 0.05
"""Fraction of the pages that fit within the limits."""


def run(options: Options) -> Report:
    """Fill the benchmark's own MinIO, then collect nearly everything once."""
    count = QUICK_PAGES if options.quick else PAGES
    report = Report("gc", "s")
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as directory,
        MinioServer(Path(directory, "data")) as server,
        Progress() as progress,
    ):
        config = MinioConfig(
            endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key
        )
        with closing(MinioTier(config)) as tier:
            _fill(tier, count, progress)
            seconds, removed = _collect(tier, int(count * PAGE_BYTES * LEFT), progress)
    report.record(f"{count:,} objects", "memkv gc", seconds)
    report.figures = {
        "gc_objects": count,
        "gc_objects_removed": removed,
        "gc_seconds": round(seconds, 1),
        "gc_removed_per_second": round(removed / seconds),
    }
    return report


def _fill(tier: MinioTier, count: int, progress: Progress) -> None:
    namespace = make_namespace(PAGE_BYTES)
    tier.describe(namespace)
    for first in progress.track(range(0, count, CHAIN), description="spilling"):
        keys = make_chain(namespace, CHAIN, f"chain {first}").keys()
        results = tier.spill(_pages(keys), time.monotonic() + 120)
        assert set(results) == {SpillResult.STORED}


def _pages(keys: list[PageKey]) -> list[Page]:
    content = memoryview(bytes(PAGE_BYTES))
    return [Page(key, (content,)) for key in keys]


def _collect(tier: MinioTier, capacity: int, progress: Progress) -> tuple[float, int]:
    """Return the seconds it took and how many pages it deleted."""
    collector, lease = tier.collector(CollectorConfig(capacity=capacity))
    task = progress.add_task("collecting")

    def step(what: str, done: int, total: int | None) -> None:
        lease.renew()
        progress.update(task, description=what, completed=done, total=total)

    began = time.perf_counter()
    lease.acquire()
    collection = collector.collect(step)
    lease.release(collection.report)
    return time.perf_counter() - began, collection.report.removed_pages
