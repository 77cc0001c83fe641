"""A request queue on Linux AIO. The calling thread submits and collects requests itself.

With threads, each request costs two wake-ups, and each wake-up needs the interpreter lock.
Container runtimes allow AIO, unlike io_uring. When the process is killed, the kernel waits for
requests in flight before it tears down the memory map; `agent.lifetime` relies on this.
"""

import os
import time
from collections.abc import Sequence

from typing_extensions import override

from memkv_sglang.tiers.nvme.disk.base import Completion, DiskRequest, OutOfTimeError, RequestQueue
from memkv_sglang.tiers.nvme.disk.linux_aio import Context


class AioQueue(RequestQueue):
    """Keeps about `depth` requests in flight, on files opened with O_DIRECT."""

    def __init__(self, depth: int) -> None:
        """Create an AIO context. Raises `OSError` if the kernel provides none."""
        self._context = Context(depth)
        self._in_flight: dict[int, DiskRequest] = {}
        self._completions: list[Completion] = []

    @override
    def submit(self, number: int, request: DiskRequest, deadline: float) -> None:
        """See `RequestQueue.submit`. Executes the request synchronously if AIO rejects it."""
        if time.monotonic() >= deadline:
            self._completions.append(Completion(number, OutOfTimeError()))
            return
        try:
            self._context.submit(number, request)
        except OSError:
            self._completions.append(Completion(number, request.try_execute()))
        else:
            self._in_flight[number] = request

    @override
    def wait(self) -> Sequence[Completion]:
        while not self._completions:
            for number, result in self._context.collect():
                request = self._in_flight.pop(number)
                self._completions.append(Completion(number, _error(request, result)))
        completions, self._completions = self._completions, []
        return completions

    @override
    def close(self) -> None:
        """Release the context. The kernel first waits for requests in flight."""
        self._context.close()


def _error(request: DiskRequest, result: int) -> Exception | None:
    """Return the error for a result, which is a number of bytes or a negative errno."""
    if result < 0:
        return OSError(-result, os.strerror(-result))
    if result < request.length:
        return request.try_execute()  # transfers the remaining bytes, or finds the end of the file
    return None
