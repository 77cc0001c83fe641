"""Requests carried out by threads: for file systems without O_DIRECT, where AIO blocks."""

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import NamedTuple

from memkv_sglang.tiers.nvme.disk.base import Completion, DiskRequest, OutOfTimeError, RequestQueue


class _Flight(NamedTuple):
    number: int
    request: DiskRequest
    deadline: float
    completions: SimpleQueue[Completion]


class DiskThreads:
    """A fixed number of threads, which all calls share."""

    def __init__(self, count: int) -> None:
        """Start the threads when there is work for them."""
        self._count = count
        self._flights: SimpleQueue[_Flight | None] = SimpleQueue()
        self._started: list[threading.Thread] = []
        self._starting = threading.Lock()

    def queue(self) -> "ThreadQueue":
        """Return a queue whose requests these threads carry out."""
        with self._starting:
            while len(self._started) < self._count:
                name = f"memkv-nvme-{len(self._started)}"
                thread = threading.Thread(target=_work, args=(self._flights,), name=name)
                thread.daemon = True  # a disk that never answers does not keep the process
                thread.start()
                self._started.append(thread)
        return ThreadQueue(self._flights)

    def close(self) -> None:
        """End the threads after the work that is queued."""
        for _ in self._started:
            self._flights.put(None)
        for thread in self._started:
            thread.join()


class ThreadQueue(RequestQueue):
    """See `DiskThreads.queue`."""

    def __init__(self, flights: "SimpleQueue[_Flight | None]") -> None:
        """Put requests into the threads' queue."""
        self._flights = flights
        self._completions: SimpleQueue[Completion] = SimpleQueue()
        self._in_flight = 0

    def submit(self, number: int, request: DiskRequest, deadline: float) -> None:
        """Queue it behind everybody's."""
        self._in_flight += 1
        self._flights.put(_Flight(number, request, deadline, self._completions))

    def wait(self) -> Sequence[Completion]:
        """Return the next one."""
        landed = self._completions.get()
        self._in_flight -= 1
        return [landed]

    def close(self) -> None:
        """Wait; the threads stay."""
        while self._in_flight:
            self.wait()


def _work(flights: "SimpleQueue[_Flight | None]") -> None:
    while (flight := flights.get()) is not None:
        late = time.monotonic() >= flight.deadline
        error = OutOfTimeError() if late else flight.request.try_execute()
        flight.completions.put(Completion(flight.number, error))
        del flight, error  # the buffers are their caller's again, not to be kept until the next one
