"""Run many clients at full rate on one node, and check every page."""

import multiprocessing
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from memkv_sglang.config.schema import MIB, Config
from memkv_testbed.faults.base import percentile
from memkv_testbed.faults.cluster import PAGE_BYTES, Cluster
from memkv_testbed.faults.node import Node, Resources, resources
from memkv_testbed.faults.tally import Tally
from memkv_testbed.faults.traffic import LONGEST, Caller, Traffic

CAPACITY = 64 * MIB
"""Bytes of the NVMe tier. They are so few that it evicts all the time."""

BACKLOG = 16 * MIB
BATCH = LONGEST * (PAGE_BYTES + 4096)
"""Maximum bytes on disk of the pages of one call."""

PROCESSES = 4
"""Number of client processes. A single interpreter could not keep the agent busy."""

REMEMBERED = 50
"""Number of recent chains that a caller loads again."""

SAMPLE = 0.25
"""Seconds between samples of the agent."""


class Loaded(NamedTuple):
    """What the clients saw, and what the agent used."""

    tally: Tally
    seconds: float
    most_bytes: int
    """Most bytes on the disk at any sample."""
    most_queued: int
    """Most bytes that waited for upload at any sample."""
    first: Resources
    """Resources of the agent after a quarter of the time."""
    last: Resources

    def percentile(self, share: float) -> float:
        """Return the seconds that this share of the lookups did not exceed."""
        return percentile(self.tally.lookups, share)


def put_under_load(cluster: Cluster, clients: int, seconds: float) -> Loaded:
    """Run clients on the cluster's disk node without pause for some seconds."""
    node = cluster.disk_node
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for number in range(PROCESSES):
        ours, theirs = context.Pipe()
        arguments = (node.config, number, clients // PROCESSES, seconds, theirs)
        workers.append(context.Process(target=_work, args=arguments, daemon=True))
        workers[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()  # the clients are connected
    for pipe in pipes:
        pipe.send("go")
    samples, levels = _watch(node, seconds)
    tally = Tally()
    for pipe in pipes:
        tally += pipe.recv()
    for worker in workers:
        worker.join()
    return Loaded(
        tally,
        seconds,
        most_bytes=max(held for held, _ in levels),
        most_queued=max(queued for _, queued in levels),
        first=samples[len(samples) // 4],
        last=samples[-1],
    )


def _watch(node: Node, seconds: float) -> tuple[Sequence[Resources], Sequence[tuple[int, int]]]:
    pid = node.agent_pid()
    assert pid is not None
    samples: list[Resources] = []
    levels: list[tuple[int, int]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        report = node.client.status()
        assert report is not None, node.client.problem
        assert report.agent.pid == pid, "the agent ended"
        levels.append((report.engine.tiers[0].bytes, report.engine.queue_bytes))
        samples.append(resources(pid))
        time.sleep(SAMPLE)
    return samples, levels


def _work(config: Config, number: int, clients: int, seconds: float, pipe: Connection) -> None:
    """Run some of the clients. This is the main function of a process."""
    node = Node(config)
    callers = [Caller(node, f"load {number}/{i}", remember=REMEMBERED) for i in range(clients)]
    pipe.send("connected")
    pipe.recv()
    with Traffic(callers, pause=0.0):
        threading.Event().wait(seconds)
    tally = Tally()
    for caller in callers:
        tally += caller.take()
        caller.close()
    node.client.close()
    pipe.send(tally)
