"""The NVMe tier against fio: spill and load, by page size."""

import tempfile
import time
from pathlib import Path

from benchmarks.base import Options
from benchmarks.fio import fio
from benchmarks.pool import HostPool, keys
from benchmarks.report import Report
from memkv_sglang.config.schema import GIB, KIB, MIB, NvmeConfig
from memkv_sglang.page import Page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier

PAGE_SIZES = {"256k": 256 * KIB, "1m": MIB, "4m": 4 * MIB}
TOTAL = 256 * MIB
DEPTH = 4
CALL = 128
"""Pages of a call: as many as SGLang hands over at once."""


def run(options: Options) -> Report:
    """Measure on the file system of `options.directory`, which needs about 3 GiB."""
    report = Report("nvme", "GB/s")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as scratch:
        plain = Path(scratch) / "fio"
        fio(plain, "write", MIB, TOTAL, DEPTH, huge=False)
        for name, size in PAGE_SIZES.items():
            for huge in (False, True):
                case = f"{name}_huge" if huge else name
                _measure(report, Path(scratch), case, size, options.repetitions, huge=huge)
    return report


def _measure(
    report: Report, scratch: Path, name: str, size: int, repetitions: int, *, huge: bool
) -> None:
    """Measure one page size; `huge`: the pool is made of huge pages."""
    config = NvmeConfig(directory=str(scratch / name), capacity=2 * GIB, threads=DEPTH)
    tier = NvmeTier(config)
    try:
        with HostPool(TOTAL // size, size, huge=huge) as pool:
            pool.fill()
            spiller = _Spiller(tier, pool)
            spiller.spill()
            contestants = {
                "fio write": lambda: fio(scratch / "fio", "write", size, TOTAL, DEPTH, huge=False),
                "spill": spiller.spill,
                "fio read": lambda: fio(scratch / "fio", "read", size, TOTAL, DEPTH, huge=False),
                "load": spiller.load,
            }
            report.compete(name, contestants, repetitions)
    finally:
        tier.close()
    report.figures[f"nvme_spill_over_fio_{name}"] = report.ratio(name, "spill", "fio write")
    report.figures[f"nvme_load_over_fio_{name}"] = report.ratio(name, "load", "fio read")


class _Spiller:
    """Spills a chain anew each time, the one before removed, so that slots are overwritten."""

    def __init__(self, tier: NvmeTier, pool: HostPool) -> None:
        self._tier = tier
        self._pool = pool
        self._round = 0

    def spill(self) -> float:
        self._tier.remove([page.key for page in self._pages()])
        self._round += 1
        pages = self._pages()
        began = time.perf_counter()
        for batch in _calls(pages):
            results = self._tier.spill(batch, time.monotonic() + 60)
            assert set(results) == {SpillResult.STORED}, results
        return TOTAL / (time.perf_counter() - began) / 1e9

    def load(self) -> float:
        pages = self._pages()
        began = time.perf_counter()
        for batch in _calls(pages):
            results = self._tier.load(batch, time.monotonic() + 60)
            assert set(results) == {LoadResult.LOADED}, results
        return TOTAL / (time.perf_counter() - began) / 1e9

    def _pages(self) -> list[Page]:
        return self._pool.place(keys(self._pool.pages, self._pool.page_bytes, str(self._round)))


def _calls(pages: list[Page]) -> list[list[Page]]:
    return [pages[i : i + CALL] for i in range(0, len(pages), CALL)]
