"""Moves: what is done for pages around the requests to the disk, several of them in flight."""

import logging
import math
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import Literal, TypeVar

from memkv_sglang.tiers.nvme.disk.aio import AioQueue
from memkv_sglang.tiers.nvme.disk.base import DiskRequest, RequestQueue
from memkv_sglang.tiers.nvme.disk.scratch import ScratchPool
from memkv_sglang.tiers.nvme.disk.threads import DiskThreads

Result = TypeVar("Result")

Move = Generator[DiskRequest, None, Result]
"""Yields what it asks of the disk, and is told there of the error; does all else between."""

_log = logging.getLogger(__name__)


class Movers:
    """Carries moves out, for several calls at once."""

    def __init__(self, depth: int, how: Literal["auto", "aio", "threads"], *, direct: bool) -> None:
        """Keep `depth` requests of a call in flight; `direct`: the files are open with O_DIRECT."""
        self.depth = depth
        self.scratches = ScratchPool()
        self._threads = DiskThreads(depth)
        self._aio = how == "aio" or (how == "auto" and direct)
        self._idle: list[RequestQueue] = []

    def run(self, moves: Iterable[Move[Result]], deadline: float = math.inf) -> list[Result]:
        """Carry the moves out; return their results, in order, when none is on the disk any more.

        A request that has not begun by the deadline (`time.monotonic()`) raises `OutOfTimeError`
        into its move. Whatever a move raises is raised here, then.
        """
        queue = self._take_queue()
        try:
            results = _carry_out(moves, queue, self.depth, deadline)
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
                self._aio = False
                fields = {"error": str(error)}
                _log.warning("no AIO, threads ask the disk instead", extra={"fields": fields})
        return self._threads.queue()

    def close(self) -> None:
        """Give threads and queues back; no call is running."""
        for queue in self._idle:
            queue.close()
        self._threads.close()


def _carry_out(
    moves: Iterable[Move[Result]], queue: RequestQueue, depth: int, deadline: float
) -> list[Result]:
    results: dict[int, Result] = {}
    in_flight: dict[int, Move[Result]] = {}
    upcoming = enumerate(moves)

    def go_on(number: int, move: Move[Result], error: Exception | None = None) -> None:
        try:
            request = next(move) if error is None else move.throw(error)
        except StopIteration as end:
            results[number] = end.value
        else:
            in_flight[number] = move
            queue.submit(number, request, deadline)

    def begin_more() -> None:
        while len(in_flight) < depth and (turn := next(upcoming, None)):
            go_on(*turn)

    begin_more()
    while in_flight:
        for number, error in queue.wait():
            move = in_flight.pop(number)
            begin_more()  # first, so that the disk does not wait for what follows here
            go_on(number, move, error)
    return [results[number] for number in sorted(results)]
