"""Measure the CPU time of loads on the node: client and agent together, without the server."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from benchmarks.peers.on_minio import open_on_minio
from benchmarks.pool import HostPool, keys
from benchmarks.report import Measure, Report
from benchmarks.servers import Minio, agent
from benchmarks.through_agent import PagesThroughAgent
from memkv_sglang.config.schema import MIB

PAGES = 128


def measure_cpu(report: Report, server: Minio, repetitions: int) -> None:
    """Load pages of 1 MiB through an agent, and with `seaweedfs` in this process."""
    with ExitStack() as stack:
        pool = stack.enter_context(HostPool(PAGES, MIB, huge=True))
        config = server.config("cpu")
        running = stack.enter_context(agent(minio=config))
        ours = PagesThroughAgent(running.client, pool, "cpu")
        ours.spill()
        contestants: dict[str, Measure] = {
            "memkv": lambda: _cost(ours.load, lambda: time.process_time() + running.cpu_seconds())
        }
        for name, peer in open_on_minio(report, ("seaweedfs",), config, pool).items():
            stack.callback(peer.close)
            pages = pool.place(keys(PAGES, MIB, "cpu"))
            peer.spill(pages)
            contestants[name] = partial(_cost, partial(peer.load, pages), time.process_time)
        report.compete("cpu 1m", contestants, repetitions)
    if "seaweedfs" in report.runs["cpu 1m"]:
        ratio = report.ratio("cpu 1m", "memkv", "seaweedfs")
        report.figures["minio_cpu_per_gb_over_seaweedfs_1m"] = ratio


def _cost(load: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return CPU seconds per GB."""
    before = clock()
    load()
    return (clock() - before) / (PAGES * MIB / 1e9)
