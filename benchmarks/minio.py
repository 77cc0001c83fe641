"""The MinIO tier against wrk on presigned URLs; and lookups with nothing known."""

import random
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from minio import Minio

from benchmarks.base import Options
from benchmarks.pool import HostPool, keys
from benchmarks.report import Report
from benchmarks.wrk import wrk
from memkv_sglang.config.schema import KIB, MIB, MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.minio_server import MinioServer
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier

PAGE_SIZES = {"256k": 256 * KIB, "1m": MIB, "4m": 4 * MIB}
TOTAL = 128 * MIB
WRK_SECONDS = 2
CHAIN = 2048


def run(options: Options) -> Report:
    """Measure against a MinIO of the benchmark's own, with its data in `options.directory`."""
    report = Report("minio", "GB/s; lookup in ms")
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as data,
        MinioServer(Path(data)) as server,
    ):
        for name, size in PAGE_SIZES.items():
            _measure_size(report, server, name, size, options.repetitions)
        _measure_lookup(report, server, options.repetitions)
    return report


def _config(server: MinioServer, bucket: str) -> MinioConfig:
    return MinioConfig(
        endpoint=server.endpoint,
        bucket=bucket,
        access_key=server.access_key,
        secret_key=server.secret_key,
        missing_ttl=0,
    )


def _measure_size(
    report: Report, server: MinioServer, name: str, size: int, repetitions: int
) -> None:
    config = _config(server, f"pages-{name}")
    tier = MinioTier(config)
    count = TOTAL // size
    rounds = iter(range(1 << 30))
    try:
        with HostPool(count, size) as pool:
            pool.fill()
            pages = pool.place(keys(count, size, "loaded"))
            assert set(tier.spill(pages, time.monotonic() + 60)) == {SpillResult.STORED}
            urls = _presigned(server, config)

            def load() -> float:
                began = time.perf_counter()
                results = tier.load(pages, time.monotonic() + 60)
                assert set(results) == {LoadResult.LOADED}, results
                return TOTAL / (time.perf_counter() - began) / 1e9

            def spill() -> float:
                fresh = pool.place(keys(count, size, f"spilled {next(rounds)}"))
                began = time.perf_counter()
                results = tier.spill(fresh, time.monotonic() + 60)
                assert set(results) == {SpillResult.STORED}, results
                return TOTAL / (time.perf_counter() - began) / 1e9

            contestants = {
                "wrk": lambda: wrk(urls, config.connections, WRK_SECONDS),
                "load": load,
                "spill": spill,
            }
            report.compete(name, contestants, repetitions)
    finally:
        tier.close()
    report.figures[f"minio_load_over_wrk_{name}"] = report.ratio(name, "load", "wrk")


def _presigned(server: MinioServer, config: MinioConfig) -> list[str]:
    client = Minio(
        server.endpoint.split("://")[1],
        access_key=server.access_key,
        secret_key=server.secret_key,
        secure=False,
    )
    names = [entry.object_name for entry in client.list_objects(config.bucket, recursive=True)]
    return [
        client.presigned_get_object(config.bucket, name, expires=timedelta(hours=1))
        for name in names
        if name and not name.endswith(".json")
    ]


def _measure_lookup(report: Report, server: MinioServer, repetitions: int) -> None:
    """Ask tiers that know nothing for a boundary at a random place."""
    config = _config(server, "lookup")
    stored = MinioTier(config)
    namespace = make_namespace(page_bytes=4 * KIB)
    hashes = make_hashes(CHAIN, "lookup")
    try:
        with HostPool(CHAIN, 4 * KIB) as pool:
            pages = pool.place(Chain(namespace.digest, hashes).keys())
            assert set(stored.spill(pages, time.monotonic() + 300)) == {SpillResult.STORED}
    finally:
        stored.close()

    def cold() -> float:
        boundary = random.randrange(CHAIN + 1)
        missing = make_hashes(CHAIN - boundary, "elsewhere", hashes[boundary - 1])
        tier = MinioTier(config)
        try:
            # One page of another chain first: connections and bucket are there, knowledge is not.
            tier.lookup(Chain(namespace.digest, make_hashes(1, "warm")), time.monotonic() + 10)
            began = time.perf_counter()
            chain = Chain(namespace.digest, [*hashes[:boundary], *missing])
            found = tier.lookup(chain, time.monotonic() + 10)
            elapsed = time.perf_counter() - began
            assert found == (boundary, True), (found, boundary)
        finally:
            tier.close()
        return elapsed * 1e3

    report.compete("2048 pages", {"cold lookup": cold}, repetitions * 4)
    report.figures["minio_lookup_2048_cold_ms"] = report.median("2048 pages", "cold lookup")
