"""The threads that move pages: so many disk requests are in flight, whoever asks."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from memkv_sglang.tiers.nvme.scratch import Scratch

Work = TypeVar("Work")
Result = TypeVar("Result")


class Movers:
    """A fixed number of threads with a queue that all calls share."""

    def __init__(self, threads: int) -> None:
        """Start the threads when there is work for them."""
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="memkv-nvme")
        self._own = threading.local()

    def run(self, move: Callable[[Work, Scratch], Result], works: Sequence[Work]) -> list[Result]:
        """Do all the work, each piece on some thread; return when none of them is at it any more.

        Whatever `move` raises is raised then.
        """
        futures = [self._pool.submit(self._move, move, work) for work in works]
        wait(futures)
        return [future.result() for future in futures]

    def _move(self, move: Callable[[Work, Scratch], Result], work: Work) -> Result:
        scratch = getattr(self._own, "scratch", None)
        if scratch is None:
            scratch = self._own.scratch = Scratch()
        return move(work, scratch)

    def close(self) -> None:
        """End the threads after the work that is queued."""
        self._pool.shutdown()
