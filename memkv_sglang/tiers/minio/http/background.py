"""Make slow calls in the background, for all callers that wait for the result."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http.errors import OutOfTimeError

Value = TypeVar("Value")


def _ignore(_: object) -> None:
    pass


class BackgroundCall(Generic[Value]):
    """Makes a slow call in a daemon thread, one call at a time. Thread-safe."""

    def __init__(
        self, call: Callable[[], Value], release: Callable[[Value], object] = _ignore
    ) -> None:
        """Prepare the call. When this is closed, `release` gets the last value."""
        self._call = call
        self._release = release
        self._lock = threading.Lock()
        self._latest: Future[Value] | None = None
        self._closed = False
        self.problem: str | None = None
        """Why the last call failed; empty if it succeeded, None before the first one ends."""

    def begin(self) -> "Future[Value]":
        """Return the call in flight, or start one. Does not block.

        Raises `TierError` once closed.
        """
        with self._lock:
            self._check_open()
            if self._latest is None or self._latest.done():
                self._latest = self._start()
            return self._latest

    def result(self, deadline: float) -> Value:
        """Return the last value. Waits for the call in flight, and retries if the last call failed.

        Raises what the call raises, `OutOfTimeError` at the deadline, and `TierError` once closed.
        """
        with self._lock:
            self._check_open()
            latest = self._latest
            if latest is None or (latest.done() and latest.exception()):
                latest = self._latest = self._start()
        if not wait([latest], max(deadline - time.monotonic(), 0)).done:
            raise OutOfTimeError("MinIO has not answered yet")
        return latest.result()

    def close(self) -> None:
        """Release the last value as soon as there is one. Does not block. Idempotent."""
        with self._lock:
            latest, closed, self._closed = self._latest, self._closed, True
        if latest is not None and not closed:
            latest.add_done_callback(self._release_value)

    def _check_open(self) -> None:
        if self._closed:
            raise TierError("the tier is closed")

    def _start(self) -> "Future[Value]":
        future = Future[Value]()
        threading.Thread(target=self._run, args=(future,), daemon=True).start()
        return future

    def _run(self, future: "Future[Value]") -> None:
        try:
            value = self._call()
        except BaseException as error:  # raised again in each waiting caller
            self.problem = str(error) or repr(error)
            future.set_exception(error)
        else:
            self.problem = ""
            future.set_result(value)

    def _release_value(self, future: "Future[Value]") -> None:
        if future.exception() is None:
            self._release(future.result())
