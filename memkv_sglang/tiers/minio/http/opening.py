"""The slow first steps - importing minio-py, credentials, the bucket - off the callers' threads."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http.errors import OutOfTimeError

Opened = TypeVar("Opened")


class Opening(Generic[Opened]):
    """Does something once in the background; tried again at the next use where it failed."""

    def __init__(self, action: Callable[[], Opened], release: Callable[[Opened], object]) -> None:
        """Begin at once; `release` is called with the outcome after `close`."""
        self._action = action
        self._release = release
        self._lock = threading.Lock()
        self._closed = False
        self.problem: str | None = None
        """Why the last attempt failed; empty if it did not, None before its end."""
        self._begin()

    def outcome(self, deadline: float) -> Opened:
        """Return the outcome, raise what the action raised, `OutOfTimeError` at the deadline."""
        with self._lock:
            if self._closed:
                raise TierError("the tier is closed")
            if self._future.done() and self._future.exception():
                self._begin()
            future = self._future
        if not wait([future], max(deadline - time.monotonic(), 0)).done:
            raise OutOfTimeError("MinIO has not answered yet")
        return future.result()

    def again(self) -> None:
        """Do it once more, since its outcome has been undone."""
        with self._lock:
            if not self._closed and self._future.done():
                self._begin()

    def close(self) -> None:
        """Release the outcome, as soon as there is one; does not block, idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._future.add_done_callback(self._release_outcome)

    def _release_outcome(self, future: "Future[Opened]") -> None:
        if future.exception() is None:
            self._release(future.result())

    def _begin(self) -> None:
        self._future: Future[Opened] = Future()
        threading.Thread(target=self._run, args=(self._future,), daemon=True).start()

    def _run(self, future: Future[Opened]) -> None:
        try:
            outcome = self._action()
            self.problem = ""
            future.set_result(outcome)
        except BaseException as error:  # handed to whoever waits
            self.problem = str(error) or repr(error)
            future.set_exception(error)
