"""Measure encryption on one core, and the throughput of MinIO with and without it."""

import itertools
import secrets
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
from memkv_testbed.minio_server import MinioServer

from benchmarks.base import Options
from benchmarks.pool import HostPool, keys
from benchmarks.report import Measure, Report
from memkv_sglang.config.schema import KIB, MIB, MinioConfig
from memkv_sglang.encryption.sealing import OVERHEAD, seal, unseal
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier

PAGE_SIZES = {"64k": 64 * KIB, "1m": MIB}
TOTAL = 64 * MIB


def run(options: Options) -> Report:
    """Measure one core, then loads and spills with the benchmark's own MinIO."""
    report = Report("encryption", "GB/s")
    for name, size in PAGE_SIZES.items():
        _measure_core(report, name, size, options.repetitions)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as directory:
        key_file = Path(directory, "keys.toml")
        key_file.touch(0o600)
        key_file.write_text(f'write = "bench"\n[keys]\nbench = "{secrets.token_hex(32)}"\n')
        with MinioServer(Path(directory, "data")) as server:
            _measure_tier(report, server, key_file, options.repetitions)
    return report


def _measure_core(report: Report, name: str, size: int, repetitions: int) -> None:
    count, master = TOTAL // size, secrets.token_bytes(32)
    sealed = [memoryview(bytearray(size + OVERHEAD)) for _ in range(count)]
    with HostPool(count, size) as pool:
        pool.fill()
        pages = pool.place(keys(count, size, "sealed"))

        def encrypt() -> float:
            began = time.perf_counter()
            for page, memory in zip(pages, sealed, strict=True):
                seal(master, page, memory)
            return TOTAL / (time.perf_counter() - began) / 1e9

        def decrypt() -> float:
            began = time.perf_counter()
            for page, memory in zip(pages, sealed, strict=True):
                unseal(master, memory, page)
            return TOTAL / (time.perf_counter() - began) / 1e9

        encrypt()
        report.compete(f"one core, {name}", {"encrypt": encrypt, "decrypt": decrypt}, repetitions)
    for verb in ("encrypt", "decrypt"):
        report.figures[f"encryption_{verb}_gb_s_{name}"] = report.median(f"one core, {name}", verb)


def _measure_tier(report: Report, server: MinioServer, key_file: Path, repetitions: int) -> None:
    plain = MinioConfig(
        endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        negative_ttl=0,
    )
    sealed = msgspec.structs.replace(plain, bucket="sealed", encryption_key_file=str(key_file))
    size = PAGE_SIZES["1m"]
    count = TOTAL // size
    contestants: dict[str, Measure] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(HostPool(count, size))
        pool.fill()
        for kind, config in (("plain", plain), ("encrypted", sealed)):
            tier = stack.enter_context(closing(MinioTier(config)))
            contestants[f"load, {kind}"] = _load(tier, pool, count, size)
            contestants[f"spill, {kind}"] = _spill(tier, pool, count, size)
        report.compete("MinIO, 1m", contestants, repetitions)
    for verb in ("load", "spill"):
        report.figures[f"encryption_{verb}_over_plain"] = report.ratio(
            "MinIO, 1m", f"{verb}, encrypted", f"{verb}, plain"
        )


def _load(tier: MinioTier, pool: HostPool, count: int, size: int) -> Measure:
    pages = pool.place(keys(count, size, "loaded"))
    assert set(tier.spill(pages, time.monotonic() + 60)) == {SpillResult.STORED}

    def load() -> float:
        began = time.perf_counter()
        assert set(tier.load(pages, time.monotonic() + 60)) == {LoadResult.LOADED}
        return TOTAL / (time.perf_counter() - began) / 1e9

    return load


def _spill(tier: MinioTier, pool: HostPool, count: int, size: int) -> Measure:
    rounds = itertools.count()

    def spill() -> float:
        fresh = pool.place(keys(count, size, f"spilled {next(rounds)}"))
        began = time.perf_counter()
        assert set(tier.spill(fresh, time.monotonic() + 60)) == {SpillResult.STORED}
        return TOTAL / (time.perf_counter() - began) / 1e9

    return spill
