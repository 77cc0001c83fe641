"""Moves: what is done for pages around the requests to the disk, several of them in flight."""

import logging
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from typing import Generic, Literal, TypeVar

from memkv_sglang.tiers.nvme.disk.aio import AioQueue
from memkv_sglang.tiers.nvme.disk.base import DiskRequest, RequestQueue
from memkv_sglang.tiers.nvme.disk.scratch import ScratchPool
from memkv_sglang.tiers.nvme.disk.threads import DiskThreads

Result = TypeVar("Result")

IoTask = Generator[DiskRequest, None, Result]
"""Yields what it asks of the disk, and is told there of the error; does all else between."""

_LEAST = 2
"""Requests in flight however large they are: one that the disk is at, and the next one."""

_log = logging.getLogger(__name__)


class IoExecutor:
    """Carries moves out, for several calls at once."""

    def __init__(self, depth: int, how: Literal["aio", "threads"], *, direct: bool) -> None:
        """Keep about `depth` requests of a call in flight; AIO only where files are `direct`."""
        self.depth = depth
        self.scratches = ScratchPool()
        self._threads = DiskThreads(depth)
        self._aio = how == "aio" and direct
        self._idle: list[RequestQueue] = []

    def run(
        self,
        moves: Iterable[IoTask[Result]],
        deadline: float = math.inf,
        in_flight: float = math.inf,
    ) -> list[Result]:
        """Carry the moves out; return their results, in order, when none is on the disk any more.

        A request that has not begun by the deadline (`time.monotonic()`) raises `OutOfTimeError`
        into its move. With `in_flight` bytes on their way no more than a second request is begun.
        Whatever a move raises is raised here, then.
        """
        queue = self._take_queue()
        try:
            results = _Run[Result](queue, self.depth, deadline, in_flight).execute(moves)
        except BaseException:
            queue.close()
            raise
        self._idle.append(queue)
        return results

    def _take_queue(self) -> RequestQueue:
        with suppress(IndexError):
            return self._idle.pop()
        if self._aio:
            try:
                return AioQueue(self.depth)
            except OSError as error:
                fields = {"error": str(error)}
                _log.warning("no AIO, threads ask the disk instead", extra={"fields": fields})
        return self._threads.queue()

    def close(self) -> None:
        """Give threads and queues back; no call is running."""
        for queue in self._idle:
            queue.close()
        self._threads.close()


class _Run(Generic[Result]):
    """The moves of one call."""

    def __init__(self, queue: RequestQueue, depth: int, deadline: float, limit: float) -> None:
        self._queue = queue
        self._depth = depth
        self._deadline = deadline
        self._limit = limit
        self._upcoming: Iterator[tuple[int, IoTask[Result]]] = iter(())
        self._in_flight: dict[int, tuple[IoTask[Result], int]] = {}
        self._bytes = 0
        self._results: dict[int, Result] = {}

    def execute(self, moves: Iterable[IoTask[Result]]) -> list[Result]:
        self._upcoming = enumerate(moves)
        self._start_more()
        while self._in_flight:
            for number, error in self._queue.wait():
                move, size = self._in_flight.pop(number)
                self._bytes -= size
                self._start_more()  # first, so that the disk does not wait for what follows here
                self._advance(number, move, error)
        return [self._results[number] for number in sorted(self._results)]

    def _start_more(self) -> None:
        while self._has_capacity() and (turn := next(self._upcoming, None)):
            self._advance(*turn)

    def _has_capacity(self) -> bool:
        requests = len(self._in_flight)
        return requests < self._depth and (requests < _LEAST or self._bytes < self._limit)

    def _advance(self, number: int, move: IoTask[Result], error: Exception | None = None) -> None:
        try:
            request = next(move) if error is None else move.throw(error)
        except StopIteration as end:
            self._results[number] = end.value
        else:
            self._in_flight[number] = (move, request.length)
            self._bytes += request.length
            self._queue.submit(number, request, self._deadline)
