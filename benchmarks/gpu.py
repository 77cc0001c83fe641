"""Load pages from disk and MinIO onto a GPU, compared with the disk and the bus alone.

As in a server, the host pool is shared memory registered with CUDA. The tier fills it, and loaded
pages are copied to the device while the next ones are loaded. Not part of `all`.
"""

import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memkv_testbed.minio_server import MinioServer

from benchmarks.base import MissingToolError, Options
from benchmarks.limits.fio import fio
from benchmarks.pool import HostPool, keys
from benchmarks.report import Report
from memkv_sglang.config.schema import GIB, MIB, MinioConfig, NvmeConfig
from memkv_sglang.page import Page
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.nvme import NvmeTier

PAGE_SIZES = {"1m": MIB, "4m": 4 * MIB}
CALL_BYTES = 64 * MIB
"""Bytes per step. They are loaded, then copied to the device while the next step is loaded."""

DEPTH = 4
CALL_SECONDS = 60.0


class Target:
    """Device memory as large as a host pool, with copies into it."""

    def __init__(self, pool: HostPool, device: str = "cuda") -> None:
        """Register the pool with CUDA, as SGLang does. Raises `RuntimeError` if that fails."""
        import torch

        self._torch = torch
        self._cuda = device.startswith("cuda")
        self._source = torch.frombuffer(pool.memory, dtype=torch.uint8)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(pool.memory))
        self.content: Any = torch.empty(pool.length, dtype=torch.uint8, device=device)
        if self._cuda:
            self._check(torch.cuda.cudart().cudaHostRegister(self._address, pool.length, 0))

    def copy(self, begin: int, end: int) -> None:
        """Start to copy these bytes of the pool to the same offset on the device."""
        self.content[begin:end].copy_(self._source[begin:end], non_blocking=True)

    def wait(self) -> None:
        """Block until all copies have ended."""
        if self._cuda:
            self._torch.cuda.synchronize()

    def equals_pool(self) -> bool:
        """Return whether device and pool have the same content."""
        return bool(self._torch.equal(self.content.cpu(), self._source))

    def close(self) -> None:
        """Unregister the pool, which must still be mapped."""
        self.wait()
        if self._cuda:
            self._check(self._torch.cuda.cudart().cudaHostUnregister(self._address))
        del self._source

    def _check(self, result: Any) -> None:
        if int(result) != 0:
            raise RuntimeError(f"CUDA refuses to register the host pool: error {int(result)}")


def run(options: Options) -> Report:
    """Measure on the first GPU; needs about 4 GiB of disk, 1 GiB of memory and 1 GiB on the GPU."""
    _check_device()
    report = Report("gpu", "GB/s")
    measure(report, options, "cuda", 256 * MIB if options.quick else GIB)
    return report


def _check_device() -> None:
    """Raise `MissingToolError` if there is no GPU."""
    try:
        import torch
    except ImportError:
        raise MissingToolError("gpu: skipped, torch is not installed") from None
    if not torch.cuda.is_available():
        raise MissingToolError("gpu: skipped, there is no CUDA device")


def measure(report: Report, options: Options, device: str, total: int) -> None:
    """Measure every page size with `total` bytes."""
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as scratch,
        MinioServer(Path(scratch) / "minio") as server,
    ):
        plain = Path(scratch) / "fio"
        fio(plain, "write", MIB, total, DEPTH, huge=False)
        for name, size in PAGE_SIZES.items():
            nvme = NvmeConfig(directory=str(Path(scratch) / name), capacity=2 * total)
            minio = MinioConfig(
                endpoint=server.endpoint,
                bucket=f"pages-{name}",
                access_key=server.access_key,
                secret_key=server.secret_key,
            )
            tiers = {"nvme": NvmeTier(nvme), "minio": MinioTier(minio)}
            try:
                disk = _disk(plain, size, total)
                _measure_size(report, options.repetitions, name, size, total, device, tiers, disk)
            finally:
                for tier in tiers.values():
                    tier.close()


def _disk(plain: Path, size: int, total: int) -> Callable[[], float]:
    return lambda: fio(plain, "read", size, total, DEPTH, huge=True)


def _measure_size(
    report: Report,
    repetitions: int,
    name: str,
    size: int,
    total: int,
    device: str,
    tiers: dict[str, Tier],
    disk: Callable[[], float],
) -> None:
    with HostPool(total // size, size, huge=True) as pool:
        pool.fill()
        pages = pool.place(keys(pool.pages, size, name))
        for tier in tiers.values():
            for _, call in _calls(pages):
                results = tier.spill(call, time.monotonic() + CALL_SECONDS)
                assert set(results) == {SpillResult.STORED}, results
        target = Target(pool, device)
        try:
            contestants = {
                "bus": lambda: _over_the_bus(target, pool),
                "fio read": disk,
                **{
                    f"{origin} to {end}": _loading(tier, pages, pool, target if to_device else None)
                    for origin, tier in tiers.items()
                    for end, to_device in (("pool", False), ("device", True))
                },
            }
            report.compete(name, contestants, repetitions)
            assert target.equals_pool()
        finally:
            target.close()
    report.figures[f"gpu_nvme_device_over_fio_{name}"] = report.ratio(
        name, "nvme to device", "fio read"
    )
    for origin in tiers:
        ratio = report.ratio(name, f"{origin} to device", f"{origin} to pool")
        report.figures[f"gpu_{origin}_device_over_pool_{name}"] = ratio


def _over_the_bus(target: Target, pool: HostPool) -> float:
    began = time.perf_counter()
    target.copy(0, pool.length)
    target.wait()
    return pool.length / (time.perf_counter() - began) / 1e9


def _loading(
    tier: Tier, pages: Sequence[Page], pool: HostPool, target: Target | None
) -> Callable[[], float]:
    """Return a contestant that loads all pages into the pool, and copies them to any device."""

    def load() -> float:
        pool.wipe()
        began = time.perf_counter()
        for first, call in _calls(pages):
            results = tier.load(call, time.monotonic() + CALL_SECONDS)
            assert set(results) == {LoadResult.LOADED}, results
            if target is not None:
                for begin, end in pool.extents(first, len(call)):
                    target.copy(begin, end)
        if target is not None:
            target.wait()
        return pool.length / (time.perf_counter() - began) / 1e9

    return load


def _calls(pages: Sequence[Page]) -> list[tuple[int, Sequence[Page]]]:
    """Return the pages in groups, each with the position of its first page."""
    each = max(CALL_BYTES // pages[0].length, 1)
    return [(first, pages[first : first + each]) for first in range(0, len(pages), each)]
