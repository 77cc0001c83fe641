"""The threads that move pages: so many disk requests are in flight, whoever asks."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar, cast

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
        results: list[Result | None] = [None] * len(works)
        turns = iter(range(len(works)))  # taking the next turn is atomic

        def take_turns() -> None:
            scratch = self._scratch()
            for turn in turns:
                results[turn] = move(works[turn], scratch)

        # A task for each thread and not for each piece: handing one over costs as much as a small
        # page takes to be moved.
        tasks = [self._pool.submit(take_turns) for _ in range(min(self.threads, len(works)))]
        wait(tasks)
        for task in tasks:
            task.result()
        return cast(list[Result], results)

    def _scratch(self) -> Scratch:
        scratch: Scratch | None = getattr(self._own, "scratch", None)
        if scratch is None:
            scratch = self._own.scratch = Scratch()
        return scratch

    def close(self) -> None:
        """End the threads after the work that is queued."""
        self._pool.shutdown()
