"""Load from a slow disk and MinIO at once (`engine.balance_loads`), relative to the disk alone."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from memkv_testbed.slow_disk import SlowDisk

from benchmarks.base import MissingToolError, Options
from benchmarks.pool import HostPool
from benchmarks.report import Measure, Panel, Report
from benchmarks.servers import RunningAgent, agent, minio
from benchmarks.through_agent import PagesThroughAgent
from memkv_sglang.config.schema import MIB, EngineConfig, MinioConfig, NvmeConfig

PAGE, PAGES = MIB, 64
RATES = {"64 MB/s": 64, "128 MB/s": 128, "256 MB/s": 256}
"""Limits of the disk, in MB/s."""
WARM_UP = 6
"""Loads in which an agent learns both speeds."""

OFF, ON = "nearest tier", "balanced"


def run(options: Options) -> Report:
    """Measure two agents in turn. Raises `MissingToolError` without root or an I/O controller."""
    report = Report("balance", "GB/s")
    repetitions = 1 if options.quick else options.repetitions
    with ExitStack() as stack:
        disk = stack.enter_context(_slow_disk(options.directory))
        server = stack.enter_context(minio(options.directory))
        config = server.config("balance")
        nodes = {
            name: stack.enter_context(_node(options.directory, config, disk, balance=name == ON))
            for name in (OFF, ON)
        }
        for label, rate in RATES.items():
            disk.limit_reads(rate * 1_000_000)
            for node in nodes.values():
                for _ in range(WARM_UP):
                    node.load()
            contestants: dict[str, Measure] = {
                name: partial(_rate, node) for name, node in nodes.items()
            }
            report.compete(label, contestants, repetitions)
            report.figures[f"balance_over_nearest_{rate}_mb_s"] = report.ratio(label, ON, OFF)
        disk.limit_reads(None)
    report.panels.append(
        Panel(
            "loads of pages that are on disk, by speed of the disk", "GB/s", {r: r for r in RATES}
        )
    )
    return report


@contextmanager
def _slow_disk(directory: Path) -> Iterator[SlowDisk]:
    try:
        disk = SlowDisk(directory)
    except OSError as error:
        raise MissingToolError(f"a disk with a limit needs root and cgroups: {error}") from None
    with disk:
        yield disk


class _Node:
    """An agent whose pages are on its disk and in MinIO."""

    def __init__(self, here: PagesThroughAgent, there: PagesThroughAgent) -> None:
        self._here = here
        self._there = there

    def load(self) -> None:
        """Load pages that are only in MinIO, and pages that are on disk too."""
        self._there.load()
        self._here.load()

    def load_from_disk(self) -> None:
        """Load pages that are on disk too."""
        self._here.load()


def _rate(node: _Node) -> float:
    began = time.perf_counter()
    node.load_from_disk()
    return PAGES * PAGE / (time.perf_counter() - began) / 1e9


@contextmanager
def _node(
    directory: Path, config: MinioConfig, disk: SlowDisk, *, balance: bool
) -> Iterator[_Node]:
    with ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(dir=directory, prefix="memkv-bench-")
        )
        other = stack.enter_context(agent(minio=config))
        nvme = NvmeConfig(directory=scratch, capacity=8 * PAGES * PAGE)
        engine = EngineConfig(promote="never", balance_loads=balance, skip_slow_loads=False)
        one = stack.enter_context(agent(nvme, config, engine=engine))
        disk.add(one.pid)
        name = f"balance {balance}"
        stored = _pages(stack, other, f"{name} there")
        there = _pages(stack, one, f"{name} there")
        here = _pages(stack, one, f"{name} here")
        stored.spill()
        here.spill()
        one.client.flush(60.0)
        yield _Node(here, there)


def _pages(stack: ExitStack, running: RunningAgent, seed: str) -> PagesThroughAgent:
    pool = stack.enter_context(HostPool(PAGES, PAGE))
    pool.fill()
    return PagesThroughAgent(running.client, pool, seed)
