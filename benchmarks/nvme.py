"""Compare the NVMe tier with fio and with SGLang's backends for local disks."""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.base import Options
from benchmarks.limits.fio import fio
from benchmarks.peers.base import Peer, open_peers
from benchmarks.peers.ours import Ours
from benchmarks.pool import HostPool
from benchmarks.report import Measure, Panel, Report
from benchmarks.sizes import SIZES, Throughput, label
from memkv_sglang.config.schema import GIB, MIB, NvmeConfig
from memkv_sglang.tiers.disks import StripedTier
from memkv_sglang.tiers.nvme import NvmeTier

PAGES = ("256k", "1m", "4m", "16m")
TOTAL = 256 * MIB
QUICK_TOTAL = 64 * MIB
IN_FLIGHT = NvmeConfig().queue_depth

DEPTHS = (1, 2, 4, 8, 16)
QUICK_DEPTHS = (1, 16)
DEPTH_PAGES = "1m"

TWO = "two directories"
SMALL = "_small_pages"
"""Suffix of the measurements with a pool in pages of 4 KiB."""


def run(options: Options) -> Report:
    """Measure on the file system of `options.directory`, which needs about 4 GiB.

    Raises `MissingToolError` without fio.
    """
    report = Report("nvme", "GB/s")
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as scratch:
        bench = _Bench(report, Path(scratch), QUICK_TOTAL if options.quick else TOTAL)
        repetitions = min(options.repetitions, 2) if options.quick else options.repetitions
        for name in PAGES:
            bench.sizes(name, repetitions, huge=True)
            bench.sizes(name, repetitions, huge=False, peers=not options.quick)
        for depth in QUICK_DEPTHS if options.quick else DEPTHS:
            bench.depth(depth, repetitions)
    _claim(report)
    return report


class _Bench:
    """Measures the disk under one directory and adds the figures to one report."""

    def __init__(self, report: Report, scratch: Path, total: int) -> None:
        self._report = report
        self._scratch = scratch
        self._total = total
        self._plain = scratch / "fio"
        fio(self._plain, "write", MIB, total, IN_FLIGHT, huge=False)

    def sizes(self, name: str, repetitions: int, *, huge: bool, peers: bool = True) -> None:
        """Spill and load pages of one size with the tier, fio and, if `peers`, the peers."""
        suffix = "" if huge else SMALL
        with ExitStack() as stack:
            pool = self._pool(stack, name, huge=huge)
            case = f"{name}{suffix}"
            opened = {"memkv": self._tier(stack, case, IN_FLIGHT)}
            if huge:
                opened[TWO] = self._two_directories(stack, case)
            if peers:
                opened |= self._peers(stack, pool, case)
            self._compete(case, name, opened, pool, repetitions, IN_FLIGHT, huge=huge)

    def depth(self, depth: int, repetitions: int) -> None:
        """Measure the tier and fio with this many pages in flight."""
        with ExitStack() as stack:
            pool = self._pool(stack, DEPTH_PAGES, huge=True)
            peers = {"memkv": self._tier(stack, f"depth-{depth}", depth)}
            case = f"{depth} in flight"
            self._compete(case, DEPTH_PAGES, peers, pool, repetitions, depth, huge=True)

    def _compete(
        self,
        case: str,
        name: str,
        peers: Mapping[str, Peer],
        pool: HostPool,
        repetitions: int,
        depth: int,
        *,
        huge: bool,
    ) -> None:
        runs = {peer: Throughput(opened, pool) for peer, opened in peers.items()}
        limit = partial(
            fio, self._plain, block=SIZES[name], total=self._total, depth=depth, huge=huge
        )
        loads: dict[str, Measure] = {"fio": partial(limit, "read")}
        spills: dict[str, Measure] = {"fio": partial(limit, "write")}
        loads |= {peer: run.load for peer, run in runs.items()}
        spills |= {peer: run.spill for peer, run in runs.items()}
        self._report.compete(f"load {case}", loads, repetitions)
        self._report.compete(f"spill {case}", spills, repetitions)

    def _pool(self, stack: ExitStack, name: str, *, huge: bool) -> HostPool:
        pool = stack.enter_context(HostPool(self._total // SIZES[name], SIZES[name], huge=huge))
        if huge and pool.huge_share() < 1:
            self._report.notes.append(
                f"{label(name)}: only {pool.huge_share():.0%} of the pool is made of huge pages"
            )
        pool.fill()
        return pool

    def _peers(self, stack: ExitStack, pool: HostPool, case: str) -> dict[str, Peer]:
        # The peers import torch and SGLang. The report can be made without them.
        def nixl(pool: HostPool) -> Peer:
            from benchmarks.peers.nixl import Nixl

            return Nixl(self._scratch / f"nixl-{case}", pool)

        def file(pool: HostPool) -> Peer:
            from benchmarks.peers.file import File

            return File(self._scratch / f"file-{case}", pool)

        found = open_peers(self._report, {"nixl": nixl, "file": file}, pool)
        for peer in found.values():
            stack.callback(peer.close)
        return found

    def _tier(self, stack: ExitStack, case: str, depth: int) -> Peer:
        config = NvmeConfig(
            directory=str(self._scratch / f"memkv-{case}"), capacity=GIB, queue_depth=depth
        )
        peer = Ours(NvmeTier(config))
        stack.callback(peer.close)
        return peer

    def _two_directories(self, stack: ExitStack, case: str) -> Peer:
        """Open the tier over two directories on one disk, which shows their overhead."""
        paths = [str(self._scratch / f"memkv-{case}-{part}") for part in ("a", "b")]
        peer = Ours(StripedTier(NvmeConfig(directory=",".join(paths), capacity=GIB)))
        stack.callback(peer.close)
        return peer


def _claim(report: Report) -> None:
    for name in PAGES:
        for verb in ("load", "spill"):
            ratio = report.ratio(f"{verb} {name}", TWO, "memkv")
            report.figures[f"nvme_{verb}_two_directories_over_one_{name}"] = ratio
        for suffix in ("", SMALL):
            case = f"{name}{suffix}"
            for verb in ("load", "spill"):
                runs = report.runs[f"{verb} {case}"]
                for peer in runs.keys() - {"memkv", TWO}:
                    ratio = report.ratio(f"{verb} {case}", "memkv", peer)
                    report.figures[f"nvme_{verb}_over_{peer}_{case}"] = ratio
    for verb in ("load", "spill"):
        for suffix, pages in (("", "huge pages"), (SMALL, "4 KiB pages")):
            cases = {label(name): f"{verb} {name}{suffix}" for name in PAGES}
            report.panels.append(Panel(f"{verb}, pool of {pages}", "GB/s", cases))
    for verb in ("load", "spill"):
        found = [case for case in report.runs if case.endswith("in flight") and verb in case]
        cases = {case.split()[1]: case for case in found}
        title = f"{verb} by pages in flight ({label(DEPTH_PAGES)}, huge pages)"
        report.panels.append(Panel(title, "GB/s", cases, lines=True))
    report.notes.append(
        "file reads through the page cache, which is dropped before each load; its spills return "
        "when the data is in that cache, not on the disk"
    )
