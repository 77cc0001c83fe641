"""Measure the agent alone: calls per second with no-op tiers, memory per page, idle CPU."""

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from statistics import harmonic_mean

from benchmarks.base import Options
from benchmarks.peers.base import CALL, demand
from benchmarks.peers.ours import Ours
from benchmarks.pool import HostPool
from benchmarks.report import Panel, Report
from benchmarks.servers import RunningAgent, agent, importable, minio
from memkv_sglang.config.schema import GIB, KIB, NvmeConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.nvme import NvmeTier

PAGES = 8
"""Pages of a small call. With 64 tokens per page, this is half a turn of a conversation."""

SECONDS = 1.0
QUICK_SECONDS = 0.3

INDEXED = 45_000
QUICK_INDEXED = 11_500
"""Numbers of pages just above a size at which a dictionary grows, where it wastes the most memory.
"""

IDLE_SECONDS = 5.0
QUICK_IDLE_SECONDS = 2.0

WAYS = ("lookup", "load", "spill")


def run(options: Options) -> Report:
    """Measure one client that calls as fast as it can, the index's memory, and an idle agent."""
    report = Report("agent", "calls/s")
    with importable(), agent(module="benchmarks.no_op_agent") as running:
        _count_calls(report, running, options)
    _weigh_index(report, options)
    _watch_idle(report, options)
    for key, case in {
        "agent_calls_per_core_second": "calls per core-second",
        "agent_calls_per_second": "calls per second",
    }.items():
        # The mean over a conversation, which makes the three calls in turn.
        report.figures[key] = harmonic_mean([report.median(case, way) for way in WAYS])
    report.figures["index_bytes_per_page"] = report.median("index", "NVMe tier")
    report.figures["agent_idle_cpu_percent"] = report.median("idle", "agent")
    cases = {name: name for name in ("calls per second", "calls per core-second")}
    report.panels = [
        Panel(f"calls of {PAGES} pages, one client, no-op tiers", "calls", cases),
        Panel("memory of the index", "bytes per page", {"": "index"}),
        Panel("CPU of an idle agent with both tiers", "% of a core", {"": "idle"}),
    ]
    return report


def _count_calls(report: Report, running: RunningAgent, options: Options) -> None:
    namespace = make_namespace(page_bytes=64 * KIB)
    client = running.client
    client.describe(namespace)
    with HostPool(PAGES, 64 * KIB) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        chain = Chain(namespace.digest, make_hashes(PAGES, "agent"))
        buffers = pool.buffers(number, range(PAGES))
        calls: dict[str, Callable[[], object]] = {
            "lookup": lambda: demand(client.lookup(chain).length == PAGES, "lookup"),
            "load": lambda: demand(
                client.load(chain, buffers)[-1].result == LoadResult.LOADED, "load"
            ),
            "spill": lambda: demand(
                client.spill(chain, buffers)[-1] == SpillResult.STORED, "spill"
            ),
        }
        for _ in range(options.repetitions):
            for way in WAYS:
                done, seconds, cpu = _call_for(
                    calls[way], running, QUICK_SECONDS if options.quick else SECONDS
                )
                report.record("calls per second", way, done / seconds)
                report.record("calls per core-second", way, done / cpu)
        client.release_pool(number)


def _call_for(
    call: Callable[[], object], running: RunningAgent, seconds: float
) -> tuple[int, float, float]:
    """Return the number of calls, the seconds, and the CPU seconds of the agent."""
    done, cpu = 0, running.cpu_seconds()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        call()
        done += 1
    return done, time.perf_counter() - began, running.cpu_seconds() - cpu


def _weigh_index(report: Report, options: Options) -> None:
    """Fill a real directory; return by how much the tier's memory has grown."""
    count = QUICK_INDEXED if options.quick else INDEXED
    namespace = make_namespace(page_bytes=4 * KIB)
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as scratch,
        HostPool(CALL, 4 * KIB) as pool,
    ):
        tier = Ours(NvmeTier(NvmeConfig(directory=scratch, capacity=2 * GIB)))
        try:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for first in range(0, count, CALL):
                hashes = make_hashes(min(CALL, count - first), f"{first}")
                tier.spill(pool.place(Chain(namespace.digest, hashes).keys()))
                del hashes
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
            tier.close()
    report.record("index", "NVMe tier", grown / count)


def _watch_idle(report: Report, options: Options) -> None:
    seconds = QUICK_IDLE_SECONDS if options.quick else IDLE_SECONDS
    with (
        minio(options.directory) as server,
        tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as scratch,
        agent(NvmeConfig(directory=scratch, capacity=GIB), server.config("idle")) as running,
    ):
        running.client.lookup(Chain(make_namespace().digest, make_hashes(1)), 4.0)
        for _ in range(2 if options.quick else options.repetitions):
            cpu = running.cpu_seconds()
            time.sleep(seconds)
            report.record("idle", "agent", 100 * (running.cpu_seconds() - cpu) / seconds)
