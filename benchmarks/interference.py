"""Measure how much transfers slow SGLang's scheduler down, with a GIL-bound loop in its place.

The loop has a core of its own. Everything else runs on another core: the agent, MinIO, and the
threads in the loop's process that wait for the agent or, for a peer, move the pages.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.base import MissingToolError, Options
from benchmarks.peers.base import Peer
from benchmarks.peers.on_minio import open_on_minio
from benchmarks.pool import HostPool, keys
from benchmarks.report import Panel, Report
from benchmarks.servers import agent, minio
from benchmarks.through_agent import PagesThroughAgent
from memkv_sglang.config.schema import GIB, MIB, MinioConfig, NvmeConfig

PAGES = 64
SECONDS = 2.0
QUICK_SECONDS = 1.0
STEPS = 200
"""Iterations of the loop between two readings of the clock."""

CASE = "loop"
MOVED = "moved"


def run(options: Options) -> Report:
    """Measure the loop alone and during transfers. Raises `MissingToolError` on a single core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise MissingToolError("interference needs two cores to pin the loop and the transfers to")
    report = Report("interference", "steps/ms")
    seconds = QUICK_SECONDS if options.quick else SECONDS
    repetitions = min(options.repetitions, 3) if options.quick else options.repetitions
    try:
        with ExitStack() as stack:
            # Everything that is started now inherits this core.
            os.sched_setaffinity(0, {cores[1]})
            transfers = _transfers(stack, report, options.directory)
            os.sched_setaffinity(0, {cores[0]})
            for _ in range(repetitions):
                report.record(CASE, "alone", _loop(seconds))
                for name, move in transfers.items():
                    with _moving(move, cores[1]) as moves:
                        report.record(CASE, name, _loop(seconds))
                    moved = sum(moves) * PAGES * MIB / 1e9 / seconds
                    report.record(MOVED, name, moved)
    finally:
        os.sched_setaffinity(0, cores)
    for name in transfers:
        key = f"scheduler_speed_kept_{name.removeprefix('memkv ')}"
        report.figures[key] = report.ratio(CASE, name, "alone")
    report.panels = [
        Panel("throughput of the loop", "steps/ms", {"": CASE}),
        Panel("throughput of loads and spills meanwhile", "GB/s", {"": MOVED}),
    ]
    return report


def _transfers(
    stack: ExitStack, report: Report, directory: Path
) -> dict[str, Callable[[], object]]:
    """Return functions by name that spill all pages of a pool and load them again."""
    server = stack.enter_context(minio(directory))
    scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=directory))
    pool = stack.enter_context(HostPool(PAGES, MIB, huge=True))
    nvme = NvmeConfig(directory=scratch, capacity=2 * GIB)
    config = server.config("interference")
    transfers = {
        "memkv nvme": _through_agent(stack, pool, nvme=nvme),
        "memkv minio": _through_agent(stack, pool, minio=config),
    }
    for name, peer in open_on_minio(report, ("seaweedfs",), config, pool).items():
        stack.callback(peer.close)
        transfers[name] = _in_process(peer, pool)
    return transfers


def _through_agent(
    stack: ExitStack,
    pool: HostPool,
    nvme: NvmeConfig | None = None,
    minio: MinioConfig | None = None,
) -> Callable[[], object]:
    running = stack.enter_context(agent(nvme=nvme, minio=minio))
    pages = PagesThroughAgent(running.client, pool, "interference")

    def move() -> None:
        pages.renew()
        pages.spill()
        pages.load()

    move()
    return move


def _in_process(peer: Peer, pool: HostPool) -> Callable[[], object]:
    number = 0

    def move() -> None:
        nonlocal number
        number += 1
        pages = pool.place(keys(PAGES, MIB, f"interference {number}"))
        peer.spill(pages)
        peer.load(pages)

    move()
    return move


@contextmanager
def _moving(move: Callable[[], object], core: int) -> Iterator[list[int]]:
    """Transfer pages in a thread on this core. The yielded count grows by 2 per round."""
    moves: list[int] = []
    ending = threading.Event()
    begun = threading.Event()

    def go_on() -> None:
        os.sched_setaffinity(0, {core})
        while not ending.is_set():
            begun.set()
            move()
            moves.append(2)

    thread = threading.Thread(target=go_on)
    thread.start()
    begun.wait()
    try:
        yield moves
    finally:
        ending.set()
        thread.join()


def _loop(seconds: float) -> float:
    """Return thousands of steps per second of Python code that never releases the GIL."""
    done, table = 0, dict.fromkeys(range(64), 0)
    began = time.perf_counter()
    end = began + seconds
    while (now := time.perf_counter()) < end:
        for step in range(STEPS):
            table[step & 63] += step
        done += STEPS
    return done / (now - began) / 1e3
