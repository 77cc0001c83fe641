"""Run the I/O tasks of a call with several disk requests in flight."""

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
"""An I/O task: a generator that yields disk requests. If a request fails, its `yield` raises the
error."""

_MIN_REQUESTS = 2
"""Minimum number of requests in flight, whatever their size: one for the disk, and the next one
waiting."""

_log = logging.getLogger(__name__)


class IoExecutor:
    """Runs I/O tasks. Thread-safe: several calls may run at the same time."""

    def __init__(self, depth: int, engine: Literal["aio", "threads"], *, direct: bool) -> None:
        """Keep about `depth` requests per call in flight. Uses AIO only for `direct` files."""
        self.depth = depth
        self.scratches = ScratchPool()
        self._threads = DiskThreads(depth)
        self._aio = engine == "aio" and direct
        self._idle: list[RequestQueue] = []

    def run(
        self,
        tasks: Iterable[IoTask[Result]],
        deadline: float = math.inf,
        in_flight: float = math.inf,
    ) -> list[Result]:
        """Run the tasks and return their results, in order. No request is in flight afterwards.

        A request that is not started by the deadline (`time.monotonic()`) raises `OutOfTimeError`
        in its task. While `in_flight` bytes are in flight, at most one more request is started. If
        a task raises an exception, this raises it after all requests have completed.
        """
        queue = self._take_queue()
        try:
            results = _Run[Result](queue, self.depth, deadline, in_flight).execute(tasks)
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
                _log.warning("no AIO, using threads for disk I/O", extra={"fields": fields})
        return self._threads.queue()

    def close(self) -> None:
        """Release threads and queues. Call it only when no call is running."""
        for queue in self._idle:
            queue.close()
        self._threads.close()


class _Run(Generic[Result]):
    """Runs the tasks of one call."""

    def __init__(self, queue: RequestQueue, depth: int, deadline: float, limit: float) -> None:
        self._queue = queue
        self._depth = depth
        self._deadline = deadline
        self._limit = limit
        self._upcoming: Iterator[tuple[int, IoTask[Result]]] = iter(())
        self._in_flight: dict[int, tuple[IoTask[Result], int]] = {}
        self._bytes = 0
        self._results: dict[int, Result] = {}

    def execute(self, tasks: Iterable[IoTask[Result]]) -> list[Result]:
        self._upcoming = enumerate(tasks)
        self._start_more()
        while self._in_flight:
            for number, error in self._queue.wait():
                task, size = self._in_flight.pop(number)
                self._bytes -= size
                # Start it first, so that the disk is not idle during `_advance`.
                self._start_more()
                self._advance(number, task, error)
        return [self._results[number] for number in sorted(self._results)]

    def _start_more(self) -> None:
        while self._has_capacity() and (started := next(self._upcoming, None)):
            self._advance(*started)

    def _has_capacity(self) -> bool:
        requests = len(self._in_flight)
        return requests < self._depth and (requests < _MIN_REQUESTS or self._bytes < self._limit)

    def _advance(self, number: int, task: IoTask[Result], error: Exception | None = None) -> None:
        try:
            request = next(task) if error is None else task.throw(error)
        except StopIteration as end:
            self._results[number] = end.value
        else:
            self._in_flight[number] = (task, request.length)
            self._bytes += request.length
            self._queue.submit(number, request, self._deadline)
