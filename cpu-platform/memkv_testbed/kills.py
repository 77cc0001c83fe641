"""Kill agents during loads while other processes read their memory maps, and detect late writes."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from memkv_sglang.agent.launch import start_agent
from memkv_sglang.client.client import CALL_LIMIT, AgentClient
from memkv_sglang.config.schema import AgentConfig, Config, NvmeConfig
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_testbed.faults.node import wait_until
from memkv_testbed.host_pool import HostPool
from memkv_testbed.processes import ending, map_readers
from memkv_testbed.slow_disk import SlowDisk

MIB = 1 << 20
PAGES = 64
"""Number of pages per load. Each has 1 MiB."""

POOL = 512
"""Number of pages in the pool. The agent touches all of them, which makes its map slow to read."""

QUIET = 0.25
"""Seconds during which pages must not change. The disk is fast again by then."""

LIMIT = 60.0
"""Maximum seconds of every wait."""

_BLOCK = 4096
_OURS = 0x55


class Kill(NamedTuple):
    """What a client saw of one kill."""

    seconds: float
    """Seconds from the kill to the end of the client's call."""
    loaded: int
    """Number of pages that the agent had reported as loaded. If it is not 0, the kill came too
    late."""
    withheld: bool
    """Whether the call returned before the agent's writes had ended."""
    changed: int
    """Number of pages that changed after the client owned them again."""


class _Agent(NamedTuple):
    client: AgentClient
    pid: int
    number: int
    """Number of the pool."""


class Kills:
    """Agents that use the same directory one after the other. Each is killed once."""

    def __init__(self, home: Path, *, readers: int, limit: float = CALL_LIMIT) -> None:
        """Fill a directory with pages.

        `readers` processes read each agent's memory map. `limit` is that of the client.
        """
        self._readers = readers
        self._limit = limit
        self._config = Config(
            agent=AgentConfig(socket=str(home / "run" / "agent.sock")),
            nvme=NvmeConfig(directory=str(home / "pages"), capacity=1 << 30),
        )
        namespace = make_namespace(MIB)
        self._chains = [make_chain(namespace, PAGES, str(number)) for number in range(6)]
        self.pool = HostPool(POOL, MIB, parts=1)
        with self._agent() as agent:
            for chain in self._chains:
                self.pool.fill(chain)
                if set(agent.client.spill(chain, self._buffers(agent, 0))) != {SpillResult.STORED}:
                    raise RuntimeError("the pages could not be stored")

    def kill(
        self,
        disk: SlowDisk | None = None,
        rate: int | None = None,
        look: Callable[[], None] | None = None,
    ) -> Kill:
        """Kill an agent while its requests are in flight on a disk of `rate` bytes per second.

        `look` is called as soon as the process has ended.
        """
        chain, first = random.choice(self._chains), random.randrange(POOL - PAGES)  # noqa: S311
        with self._agent() as agent, map_readers(agent.pid, self._readers), _limited(disk):
            load = _Load(self.pool, agent.client, chain, self._buffers(agent, first), first)
            if disk is not None:
                disk.add(agent.pid)
                disk.limit_reads(rate)
            read = _bytes_read(agent.pid)
            load.start()
            wait_until(lambda: load.returned.is_set() or _bytes_read(agent.pid) - read >= MIB)
            began = time.monotonic()
            os.kill(agent.pid, signal.SIGKILL)
            if look is not None:
                _wait_for_process(agent.pid)
                look()
            if not load.returned.wait(LIMIT):
                raise TimeoutError("the call did not return")
            seconds = time.monotonic() - began
            if disk is not None:
                disk.limit_reads(None)
            return Kill(seconds, load.loaded, load.withheld, load.count_changes())

    @contextmanager
    def _agent(self) -> Iterator[_Agent]:
        """Run an agent that has touched the whole pool. End it if it is still alive."""
        start_agent(self._config)
        # a client that starts no other agent
        client = AgentClient(self._config, start=False, limit=self._limit)
        try:
            report = client.status() if client.wait(LIMIT) else None
            if report is None:
                raise TimeoutError(client.problem)
            number = client.register_pool(self.pool.descriptor, self.pool.length)
            agent = _Agent(client, report.agent.pid, number)
            for first in range(0, POOL, PAGES):
                client.load(self._chains[0], self._buffers(agent, first))
            with ending(agent.pid):
                yield agent
                client.shutdown()
        finally:
            client.close()

    def _buffers(self, agent: _Agent, first: int) -> list[list[Buffer]]:
        return self.pool.buffers(agent.number, range(first, first + PAGES))


class _Load(threading.Thread):
    """A load in a thread, which overwrites the pages as soon as the client owns them again."""

    def __init__(
        self,
        pool: HostPool,
        client: AgentClient,
        chain: Chain,
        buffers: list[list[Buffer]],
        first: int,
    ) -> None:
        super().__init__(daemon=True)
        self._client, self._chain, self._buffers = client, chain, buffers
        self._memory = pool.memory[first * MIB : (first + PAGES) * MIB]
        self._memory[:] = bytes(len(self._memory))
        self._free = threading.Event()
        self._ours = b""
        self.returned = threading.Event()
        self.loaded = 0
        self.withheld = False

    def run(self) -> None:
        loads = self._client.load(self._chain, self._buffers)
        self.loaded = sum(load.result is LoadResult.LOADED for load in loads)
        self.withheld = self._client.withholding
        if not self.withheld:
            self._use()
        self.returned.set()
        if self.withheld:
            self._client.when_free(self._use)

    def _use(self) -> None:
        for block in range(0, len(self._memory), _BLOCK):
            self._memory[block] = _OURS
        self._ours = bytes(self._memory)
        self._free.set()

    def count_changes(self) -> int:
        """Wait until the client owns the pages; return how many change after that."""
        if not self._free.wait(LIMIT):
            raise TimeoutError("the pages stayed withheld")
        time.sleep(QUIET)
        pages = [slice(page * MIB, (page + 1) * MIB) for page in range(PAGES)]
        return sum(self._memory[page] != self._ours[page] for page in pages)


@contextmanager
def _limited(disk: SlowDisk | None) -> Iterator[None]:
    """Lift the limit at the end of the block, even after an exception."""
    try:
        yield
    finally:
        if disk is not None:
            disk.limit_reads(None)


def _wait_for_process(pid: int) -> None:
    with suppress(ProcessLookupError), ending(pid):
        pass


def _bytes_read(pid: int) -> int:
    """Return the bytes that a process has requested from disks so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])
