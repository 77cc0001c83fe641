"""Nodes and MinIO servers, each on a machine of its own."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from memkv_testbed.machines import Machine
from memkv_testbed.minio_server import MinioServer

from benchmarks.node.callers import Callers, Done
from benchmarks.servers import agent
from memkv_sglang.config.schema import MIB, MinioConfig, ShardConfig

CALL_BYTES = 128 * MIB
"""Bytes of a call: 128 pages of 1 MiB, or fewer that are larger. At these rates, concurrent calls
with more would take longer than the 5 s that a call may take.
"""


STALL = 5.0
"""Seconds without progress that a transfer may take: dozens of them share a narrow line."""


class Node:
    """A node's agent, and the processes that call it."""

    def __init__(self, machine: Machine, callers: Callers) -> None:
        self.machine = machine
        self.callers = callers

    @classmethod
    @contextmanager
    def open(
        cls, machine: Machine, config: MinioConfig, callers: int, page_bytes: int, pages: int
    ) -> Iterator["Node"]:
        """Start the agent on the machine, and callers that store `pages` pages each."""
        with ExitStack() as stack:
            with machine.network():
                running = stack.enter_context(agent(minio=config))
            per_call = CALL_BYTES // page_bytes
            started = Callers(running.config, callers, pages, page_bytes, per_call)
            yield cls(machine, stack.enter_context(started))

    def run(self, method: str, callers: int, seconds: float) -> float:
        """Let the first callers repeat `load` or `spill`; return GB/s of pages."""
        return rate(self.callers.run(method, callers, seconds))


def rate(done: Sequence[Done]) -> float:
    """Return GB/s over all callers, up to the end of the last one.

    This is a lower bound: at the end, some callers have finished.
    """
    return sum(one.bytes for one in done) / max(one.seconds for one in done) / 1e9


def load_together(nodes: Sequence[Node], seconds: float) -> tuple[float, list[float]]:
    """Let one caller of each node load at the same time.

    Returns GB/s, and each node's share of the bytes received. The shares are those in the middle
    half of the time, when all nodes load.
    """
    with ThreadPoolExecutor(len(nodes)) as executor:
        runs = [executor.submit(node.callers.run, "load", 1, seconds) for node in nodes]
        time.sleep(seconds / 4)
        before = [node.machine.received() for node in nodes]
        time.sleep(seconds / 2)
        received = [
            node.machine.received() - begin for node, begin in zip(nodes, before, strict=True)
        ]
        done = [one for run in runs for one in run.result()]
    return rate(done), [one / sum(received) for one in received]


@contextmanager
def single_servers(machines: Sequence[Machine], directory: Path) -> Iterator[list[MinioServer]]:
    """Run one MinIO server on each machine."""
    with ExitStack() as stack:
        servers = []
        for machine in machines:
            server = MinioServer(directory / machine.address, host=machine.address)
            with machine.network():
                servers.append(stack.enter_context(server))
        yield servers


def on_one(server: MinioServer, bucket: str) -> MinioConfig:
    """Return settings for a bucket on one server."""
    return MinioConfig(
        endpoint=server.endpoint,
        bucket=bucket,
        access_key=server.access_key,
        secret_key=server.secret_key,
        stall_timeout=STALL,
    )


def on_shards(servers: Sequence[MinioServer], bucket: str) -> MinioConfig:
    """Return settings for a bucket on each of several servers."""
    shards = tuple(
        ShardConfig(
            name=shard_name(number),
            endpoint=server.endpoint,
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        for number, server in enumerate(servers)
    )
    return MinioConfig(bucket=bucket, shards=shards, stall_timeout=STALL)


def shard_name(number: int) -> str:
    """Return a shard's name, which decides which pages belong to it."""
    return f"s{number}"
