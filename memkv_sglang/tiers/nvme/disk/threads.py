"""A request queue on threads, for file systems without O_DIRECT, on which AIO blocks."""

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import NamedTuple

from typing_extensions import override

from memkv_sglang.tiers.nvme.disk.base import Completion, DiskRequest, OutOfTimeError, RequestQueue


class _Flight(NamedTuple):
    number: int
    request: DiskRequest
    deadline: float
    completions: SimpleQueue[Completion]


class DiskThreads:
    """A fixed number of I/O threads that all calls share."""

    def __init__(self, count: int) -> None:
        """Use `count` threads, which are started on first use."""
        self._count = count
        self._flights: SimpleQueue[_Flight | None] = SimpleQueue()
        self._started: list[threading.Thread] = []
        self._starting = threading.Lock()

    def queue(self) -> "ThreadQueue":
        """Return a queue whose requests these threads execute."""
        with self._starting:
            while len(self._started) < self._count:
                name = f"memkv-nvme-{len(self._started)}"
                thread = threading.Thread(target=_work, args=(self._flights,), name=name)
                # daemon, because a disk that never answers must not keep the process alive
                thread.daemon = True
                thread.start()
                self._started.append(thread)
        return ThreadQueue(self._flights)

    def close(self) -> None:
        """Stop the threads after they have executed all queued requests."""
        for _ in self._started:
            self._flights.put(None)
        for thread in self._started:
            thread.join()


class ThreadQueue(RequestQueue):
    """A queue whose requests the threads of `DiskThreads` execute."""

    def __init__(self, flights: "SimpleQueue[_Flight | None]") -> None:
        """Put the requests in `flights`, the queue of the threads."""
        self._flights = flights
        self._completions: SimpleQueue[Completion] = SimpleQueue()
        self._in_flight = 0

    @override
    def submit(self, number: int, request: DiskRequest, deadline: float) -> None:
        """See `RequestQueue.submit`. The request waits behind those of other calls."""
        self._in_flight += 1
        self._flights.put(_Flight(number, request, deadline, self._completions))

    @override
    def wait(self) -> Sequence[Completion]:
        completion = self._completions.get()
        self._in_flight -= 1
        return [completion]

    @override
    def close(self) -> None:
        """Wait for requests in flight; the threads keep running."""
        while self._in_flight:
            self.wait()


def _work(flights: "SimpleQueue[_Flight | None]") -> None:
    while (flight := flights.get()) is not None:
        is_late = time.monotonic() >= flight.deadline
        error = OutOfTimeError() if is_late else flight.request.try_execute()
        flight.completions.put(Completion(flight.number, error))
        del flight, error  # Release the caller's buffers before waiting for the next request.
