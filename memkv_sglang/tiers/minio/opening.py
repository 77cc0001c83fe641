"""The slow first steps - importing minio-py, credentials, the bucket - off the callers' threads."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.errors import OutOfTimeError

Opened = TypeVar("Opened")


class Opening(Generic[Opened]):
    """Does something once in the background; tried again at the next use where it failed."""

    def __init__(self, action: Callable[[], Opened]) -> None:
        """Begin at once."""
        self._action = action
        self._lock = threading.Lock()
        self._closed = False
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
        """Wait for the action in flight; idempotent."""
        with self._lock:
            self._closed = True
        self._thread.join()

    def _begin(self) -> None:
        self._future: Future[Opened] = Future()
        self._thread = threading.Thread(target=self._run, args=(self._future,), daemon=True)
        self._thread.start()

    def _run(self, future: Future[Opened]) -> None:
        try:
            future.set_result(self._action())
        except BaseException as error:  # handed to whoever waits
            future.set_exception(error)
