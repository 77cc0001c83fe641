"""Move the pages of a call in order on a few threads, until all are moved or time is up."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from memkv_sglang.tiers.minio.http import OutOfTimeError
from memkv_sglang.tiers.minio.objects import Guard

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class TransferPool:
    """The tier's threads, which all calls share page by page. Thread-safe."""

    def __init__(self, count: int) -> None:
        """Move up to `count` pages at once."""
        self._count = count
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="memkv-minio")
        self._calls = 0
        self._lock = threading.Lock()

    def run(
        self,
        move: Callable[[int, Guard], Result],
        count: int,
        deadline: float,
        *,
        goes_on: Callable[[Result], bool],
        failed: Result,
    ) -> list[Result | None]:
        """Call `move(0, guard)` to `move(count - 1, guard)` in order, several at once.

        After a result for which `goes_on` is False, no more calls are started. Calls that were not
        started have the result None. The first call always has a result. Returns once no call holds
        the guard. That is shortly after `deadline` at the latest if `move` respects the deadline
        while it holds the guard. Calls that have not returned by then count as `failed`.
        """
        batch = _Batch(move, count, goes_on, failed)
        with self._lock:
            self._calls += 1
        try:
            for _ in range(min(count, self._count)):
                self._executor.submit(self._work, batch)
            return batch.wait(deadline)
        except RuntimeError:  # the executor is shut down
            return batch.wait(0.0)
        finally:
            with self._lock:
                self._calls -= 1

    def close(self) -> None:
        """Stop the threads after the calls in flight. Idempotent."""
        self._executor.shutdown()

    def _work(self, batch: "_Batch[Result]") -> None:
        while batch.step():
            if self._calls > 1:  # give the other calls a turn
                self._executor.submit(self._work, batch)
                return


class _Batch(Generic[Result]):
    """A call, and the guard of its pages. A class, because a generator costs more per page."""

    def __init__(
        self,
        move: Callable[[int, Guard], Result],
        count: int,
        goes_on: Callable[[Result], bool],
        failed: Result,
    ) -> None:
        self._move = move
        self._goes_on = goes_on
        self._failed = failed
        self._results: list[Result | None] = [None] * count
        self._next = 0
        self._in_flight = 0
        self._guarded = 0
        self._over = False
        self._stopped = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def step(self) -> bool:
        """Move the next page. Returns False if there is no more."""
        with self._lock:
            if self._idle():
                return False
            index = self._next
            self._next += 1
            self._in_flight += 1
            self._results[index] = self._failed
        try:
            result = self._move(index, self)
        except OutOfTimeError:
            result = self._failed
        except Exception:
            logger.exception("page transfer failed unexpectedly")
            result = self._failed
        with self._lock:
            if not self._over:
                self._results[index] = result
            self._stopped |= not self._goes_on(result)
            self._in_flight -= 1
            # Wake the caller only at the end: doing so for each page costs a tenth of the rate.
            if self._done():
                self._changed.notify_all()
        return True

    def wait(self, deadline: float) -> list[Result | None]:
        """Wait until all pages are moved, or until the deadline; return the results."""
        with self._changed:
            self._changed.wait_for(self._done, max(deadline - time.monotonic(), 0))
            self._over = True
            # Calls that hold the guard end in time too, and their results are still valid.
            self._changed.wait_for(lambda: self._guarded == 0)
            if self._next == 0 and self._results:
                self._results[0] = self._failed
            return list(self._results)

    def _done(self) -> bool:
        return self._in_flight == 0 and self._idle()

    def _idle(self) -> bool:
        return self._over or self._stopped or self._next == len(self._results)

    def __enter__(self) -> None:
        with self._lock:
            if self._over:
                raise OutOfTimeError("the deadline passed")
            self._guarded += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._guarded -= 1
            if self._over:
                self._changed.notify_all()
