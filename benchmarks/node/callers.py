"""Client processes, each with its own host pool, that call one agent at the same time."""

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import xxhash

from benchmarks.peers.base import CALL, demand
from benchmarks.pool import HostPool
from benchmarks.through_agent import PagesThroughAgent
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import Config

START = 60.0
"""Seconds for a caller to connect."""

AHEAD = 0.01
"""Seconds between an order and the start that is common to all callers."""


class _Order(NamedTuple):
    method: str
    """Name of the method of `PagesThroughAgent` to call."""
    begin: float
    """Start time, on `time.monotonic`."""
    seconds: float
    """Seconds to repeat the call; 0 for a single call."""


class Done(NamedTuple):
    """What one caller did."""

    bytes: int
    seconds: float
    """Seconds since the common start."""
    cpu: float


class Callers:
    """Processes that each have a pool of `pages` pages. A context manager."""

    def __init__(
        self,
        config: Config,
        count: int,
        pages: int,
        page_bytes: int,
        pages_per_call: int = CALL,
    ) -> None:
        """Start the processes and store their pages through the agent of `config`."""
        context = multiprocessing.get_context("spawn")
        self._stack = ExitStack()
        self._pipes: list[Connection] = []
        for number in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, config, pages, page_bytes, pages_per_call, number)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._stack.callback(process.join)
            self._stack.callback(ours.close)
            self._pipes.append(ours)
        # Store one caller's pages after the other, because a slow server could not store all of
        # them within a call's deadline.
        self.hashes: list[list[bytes]] = [_ask(pipe, None) for pipe in self._pipes]
        """Page hashes of each caller's chain."""
        self.page_bytes = page_bytes

    def __enter__(self) -> "Callers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, method: str, callers: int, seconds: float = 0.0) -> list[Done]:
        """Make the first callers repeat `load` or `spill` for some seconds; 0 for one call."""
        order = _Order(method, time.monotonic() + AHEAD, seconds)
        for pipe in self._pipes[:callers]:
            pipe.send(order)
        return [_receive(pipe) for pipe in self._pipes[:callers]]


def _ask(pipe: Connection, order: _Order | None) -> Any:
    pipe.send(order)
    return _receive(pipe)


def _receive(pipe: Connection) -> Any:
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(
    pipe: Connection,
    config: Config,
    pages: int,
    page_bytes: int,
    pages_per_call: int,
    number: int,
) -> None:
    """Answer each order with `Done` or an exception. The first order stores the pages."""
    with HostPool(pages, page_bytes, huge=True) as pool, AgentClient(config, start=False) as client:
        if not client.wait(START):
            raise RuntimeError(f"no agent: {client.problem}")
        pool.fill()
        moved = PagesThroughAgent(client, pool, f"caller {number}", pages_per_call)
        while True:
            try:
                order = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(_execute(moved, order, pool.length) if order else _store(moved, pool))
            except Exception as error:
                pipe.send(error)


def _store(moved: PagesThroughAgent, pool: HostPool) -> list[bytes]:
    """Store the pages, check that they load byte for byte, and return their hashes."""
    moved.spill()
    content = xxhash.xxh3_128_digest(pool.memory)
    pool.wipe()
    moved.load()
    demand(xxhash.xxh3_128_digest(pool.memory) == content, "content")
    return list(moved.chain.hashes)


def _execute(moved: PagesThroughAgent, order: _Order, size: int) -> Done:
    cpu, done = time.process_time(), 0
    time.sleep(max(order.begin - time.monotonic(), 0.0))
    while not done or time.monotonic() - order.begin < order.seconds:
        if order.method == "spill":
            moved.renew()
        getattr(moved, order.method)()
        done += size
    return Done(done, time.monotonic() - order.begin, time.process_time() - cpu)


def rates(done: Sequence[Done]) -> float:
    """Return the sum of the callers' bytes per second."""
    return sum(one.bytes / one.seconds for one in done)
