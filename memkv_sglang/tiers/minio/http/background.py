"""A slow call that is made off its callers' threads, one at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BackgroundCall(Generic[Value]):
    """Makes a call in a daemon thread for all who want its outcome. Thread-safe."""

    def __init__(self, call: Callable[[], Value]) -> None:
        """Make no call yet."""
        self._call = call
        self._lock = threading.Lock()
        self._pending: Future[Value] | None = None

    def begin(self) -> "Future[Value]":
        """Return the call in flight, begun now if there is none; does not block."""
        with self._lock:
            pending = self._pending
            if pending is None:
                pending = Future()
                threading.Thread(target=self._run, args=(pending,), daemon=True).start()
                self._pending = pending  # not before: without a thread it would never end
        return pending

    def _run(self, pending: "Future[Value]") -> None:
        try:
            value = self._call()
        except BaseException as error:  # handed to whoever waits
            self._end()
            pending.set_exception(error)
        else:
            self._end()
            pending.set_result(value)

    def _end(self) -> None:
        with self._lock:
            self._pending = None
