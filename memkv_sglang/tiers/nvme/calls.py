"""Calls in flight, for a close that waits for them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CallsInFlight:
    """Counts calls, and lets none begin once closed."""

    def __init__(self) -> None:
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Count a call; yields False if it must not begin."""
        with self._changed:
            entered = not self._closed
            self._count += entered
        try:
            yield entered
        finally:
            with self._changed:
                self._count -= entered
                self._changed.notify_all()

    def close(self) -> bool:
        """Let no call begin any more and wait for those that have; False if done before."""
        with self._changed:
            first = not self._closed
            self._closed = True
            self._changed.wait_for(lambda: self._count == 0)
        return first
