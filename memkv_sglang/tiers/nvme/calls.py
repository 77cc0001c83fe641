"""Count calls in flight, so that `close` can wait for them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CallsInFlight:
    """Counts calls in flight, and admits no new ones once closed."""

    def __init__(self) -> None:
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def enter(self) -> Iterator[bool]:
        """Count a call. Yields False if `close` was called, so that the call must not start."""
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
        """Admit no more calls and wait for those in flight. Returns False if already closed."""
        with self._changed:
            first = not self._closed
            self._closed = True
            self._changed.wait_for(lambda: self._count == 0)
        return first
