"""Count the requests that using and removing a bucket's pages take, for buckets of two sizes.

Also measures the time and memory of the collection.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from memkv_testbed.minio_server import MinioServer
from rich.progress import Progress

from benchmarks.base import Options
from benchmarks.report import Report
from benchmarks.request_counter import counted_requests
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.entries import ENTRY, Entries, split

SIZES = (100_000, 1_000_000)
QUICK_SIZES = (2_000, 5_000)
PAGE_BYTES = 1024
"""Bytes per page. Few, because the time to delete a page does not depend on its content."""

CHAIN = 1000
"""Pages per chain. Leaves are removed before roots."""

LEFT = 0.05
"""Share of the pages that fits within the limits."""

LINKS = 50_000
"""Maximum links to one file, because file systems have a limit."""

LOG_ENTRIES = 1 << 16
"""Entries per log. An agent writes as many at once."""

NODES = 4
"""Nodes that use the pages of a bucket."""

INTERVALS = 6
"""Intervals of collection in a period, as by default."""

LOOKS = 5
"""How often a node looks in an interval, on average, whether a collection is due."""


def run(options: Options) -> Report:
    """Fill a MinIO with each number of pages, then collect nearly all of them once."""
    sizes = QUICK_SIZES if options.quick else SIZES
    report = Report("gc", "s")
    for count in sizes:
        figures = measure(options.directory, count)
        report.record(f"{count:,} objects", "memkv gc", figures["seconds"])
        report.figures |= {f"gc_{key}_{count}": value for key, value in figures.items()}
    for key in ("gc_requests_per_removed_page", "gc_requests_per_used_page"):
        report.figures[key] = max(report.figures[f"{key}_{count}"] for count in sizes)
    return report


def measure(directory: Path, count: int) -> dict[str, float]:
    """Return the figures of collecting a bucket with `count` pages."""
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix="memkv-bench-") as home,
        MinioServer(Path(home, "data")) as server,
        Progress() as progress,
    ):
        config = MinioConfig(
            endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key
        )
        with closing(MinioTier(config)) as tier:
            fill(tier, server.data_dir / config.bucket, count, progress)
            use_requests = use(config, count)
            collector = tier.retention.collector(
                CollectorConfig(capacity=int(count * PAGE_BYTES * LEFT), interval=1)
            )
            task = progress.add_task("collecting")

            def step(what: str, done: int, total: int | None) -> None:
                progress.update(task, description=what, completed=done, total=total)

            with counted_requests() as requests:
                began = time.perf_counter()
                collection = collector.collect(step)
                seconds = time.perf_counter() - began
        removed = collection.report.removed_pages
        left = sum(1 for _ in (server.data_dir / config.bucket).rglob("xl.meta"))
    assert abs(collection.report.pages - left) < 200, "other objects are few"
    total = sum(requests.values())
    return {
        "objects": count,
        "removed": removed,
        "seconds": round(seconds, 1),
        "removed_per_second": round(removed / seconds),
        "requests": total,
        "requests_per_removed_page": round(total / removed, 5),
        "requests_per_used_page": round(use_requests / count, 5),
        "memory_bytes": collection.memory,
    }


def fill(tier: MinioTier, folder: Path, count: int, progress: Progress) -> None:
    """Store pages, and log them as the node does that stores them.

    Only the first page is sent to the server. The others are links to its file, because storing a
    million objects one by one would take longer than everything else.
    """
    namespace = make_namespace(PAGE_BYTES)
    tier.describe(namespace)
    first = make_chain(namespace, 1, "first").keys()[0]
    page = Page(first, (memoryview(bytes(PAGE_BYTES)),))
    assert tier.spill([page], time.monotonic() + 60) == [SpillResult.STORED]
    assert tier.flush_accesses(60)
    names = ObjectNames("")
    source = folder / names.page(first) / "xl.meta"
    log(tier, namespace.digest, count - 1)
    made: set[str] = set()
    task = progress.add_task("filling", total=count)
    for number, key in enumerate(_keys(namespace.digest, count - 1)):
        name = names.page(key)
        parent = name[:-65]
        if parent not in made:
            (folder / parent).mkdir(parents=True, exist_ok=True)
            made.add(parent)
        place = f"{folder}/{name}"
        os.mkdir(place)  # noqa: PTH102 - a million times, so as fast as can be
        if number % LINKS == 0:
            source = Path(shutil.copy(source, f"{place}/xl.meta"))
        else:
            os.link(source, f"{place}/xl.meta")
        if number % 1000 == 0:
            progress.update(task, completed=number)


def log(tier: MinioTier, digest: bytes, count: int) -> None:
    """Log that pages were stored."""
    logs, now = tier.retention.parts().logs, int(time.time())
    for found in split(_entries(digest, count, now), LOG_ENTRIES):
        logs.write(found, now)


def use(config: MinioConfig, count: int) -> int:
    """Use every page in one period, on four nodes and in all intervals.

    Returns the S3 requests of the nodes and of the collection that ends the period. No objects are
    needed for the pages.
    """
    hashes = [key.hash for key in _keys(make_namespace(PAGE_BYTES).digest, count - 1)]
    with ExitStack() as stack:
        nodes = [stack.enter_context(closing(MinioTier(config))) for _ in range(NODES)]
        collector = nodes[0].retention.collector(CollectorConfig(interval=1))
        collector.collect(lambda *_: None)  # this merges the logs of stored pages
        time.sleep(1.5)  # the shortest interval is 1 s; nodes look again only after it
        with counted_requests() as requests:
            for interval in range(INTERVALS):
                for number, node in enumerate(nodes):
                    some = hashes[interval * NODES + number :: INTERVALS * NODES]
                    node.record_access(
                        Chain(make_namespace(PAGE_BYTES).digest, some), range(len(some))
                    )
                    assert node.flush_accesses(60)
                    for _ in range(LOOKS):
                        collector.look()
                        assert not collector.is_due()
            collector.collect(lambda *_: None)
    return sum(requests.values())


def _hashes(count: int) -> bytes:
    return np.random.default_rng(1).bytes(32 * count)


def _keys(digest: bytes, count: int) -> Iterator[PageKey]:
    hashes = _hashes(count)
    for i in range(count):
        yield PageKey(digest, hashes[32 * i : 32 * i + 32])


def _entries(digest: bytes, count: int, now: int) -> Entries:
    found = np.zeros(count, ENTRY)
    raw = np.empty((count, len(digest) + 32), np.uint8)
    raw[:, : len(digest)] = np.frombuffer(digest, np.uint8)
    raw[:, len(digest) :] = np.frombuffer(_hashes(count), np.uint8).reshape(count, 32)
    found["key"] = raw.view(f"S{raw.shape[1]}").reshape(-1)
    found["size"] = PAGE_BYTES
    found["used"] = found["written"] = now
    found["position"] = np.arange(count) % CHAIN
    return found
