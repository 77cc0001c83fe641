"""Run the parts of a call in parallel, such that none of them outlives the call."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


def run_in_parallel(parts: Sequence[tuple[Executor, Callable[[], T]]]) -> list[T]:
    """Run each part in its executor, the last in this thread; return their results in order.

    Blocks until every part has ended, and only then raises the first error, because the parts may
    use the caller's buffers. If no thread has started a part by then, for example because the
    system allows no further threads, the part runs in this thread.
    """
    works = [_Work(part) for _, part in parts]
    for (executor, _), work in zip(parts[:-1], works, strict=False):
        # The thread could not be started, but the executor may still hold the part.
        with suppress(RuntimeError):
            executor.submit(work.run_once)
    for work in reversed(works):
        work.run_once()
        work.ended.wait()
    return [work.result() for work in works]


class _Work(Generic[T]):
    """A part that runs at most once, in the first thread that gets to it."""

    def __init__(self, part: Callable[[], T]) -> None:
        self.ended = threading.Event()
        self._part = part
        self._started = threading.Lock()
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run_once(self) -> None:
        """Run the part and keep its result or error, unless another thread has started it."""
        if not self._started.acquire(blocking=False):
            return
        try:
            self._results.append(self._part())
        except BaseException as error:  # `result` raises the error
            self._error = error
        finally:
            self.ended.set()

    def result(self) -> T:
        """Return the result of a part that has ended, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._results[0]
