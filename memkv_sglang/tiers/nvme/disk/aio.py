"""Requests in flight by Linux AIO: the calling thread submits and collects, no other takes part.

Handing work to threads costs two wake-ups a request, and each needs the interpreter's lock.
Container runtimes allow AIO, unlike io_uring. When the process is killed, the kernel waits for what
is in flight as it tears down the memory map; see `agent.lifetime` for what proves that.
"""

import os
import time
from collections.abc import Sequence

from memkv_sglang.tiers.nvme.disk.base import Completion, DiskRequest, OutOfTimeError, RequestQueue
from memkv_sglang.tiers.nvme.disk.linux_aio import Context


class AioQueue(RequestQueue):
    """Room for `depth` requests and some more, on files that are open with O_DIRECT."""

    def __init__(self, depth: int) -> None:
        """Open a context. Raises `OSError` where there is none to be had."""
        self._context = Context(depth)
        self._in_flight: dict[int, DiskRequest] = {}
        self._completions: list[Completion] = []

    def submit(self, number: int, request: DiskRequest, deadline: float) -> None:
        """Send it to the disk; what AIO does not take is carried out here."""
        if time.monotonic() >= deadline:
            self._completions.append(Completion(number, OutOfTimeError()))
            return
        try:
            self._context.submit(number, request)
        except OSError:
            self._completions.append(Completion(number, request.try_execute()))
        else:
            self._in_flight[number] = request

    def wait(self) -> Sequence[Completion]:
        """Collect what has landed."""
        while not self._completions:
            for number, result in self._context.collect():
                request = self._in_flight.pop(number)
                self._completions.append(Completion(number, _error(request, result)))
        landed, self._completions = self._completions, []
        return landed

    def close(self) -> None:
        """Let the kernel wait for what is in flight."""
        self._context.close()


def _error(request: DiskRequest, result: int) -> Exception | None:
    """Return what a result stands for: bytes, or a negative errno."""
    if result < 0:
        return OSError(-result, os.strerror(-result))
    if result < request.length:
        return request.try_execute()  # moves the rest, or finds the file's end
    return None
