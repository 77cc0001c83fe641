"""Pages whose use in the present period is noted already, so that nobody notes it again."""

import threading
import time
from contextlib import suppress

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.minio.http import ProtocolError, ResponseHead, ServerClock, modified_time

LIMIT = 500_000
"""Pages that are remembered; some 60 MB."""


class AccessTimeCache:
    """Periods are those of the server's clock. Safe for any number of threads."""

    def __init__(self, period: float, clock: ServerClock) -> None:
        """Periods have so many seconds."""
        self._period = period
        self._clock = clock
        self._keys: set[bytes] = set()
        self._present = -1.0
        self._until = 0.0
        self._lock = threading.Lock()

    def saw(self, key: PageKey, head: ResponseHead) -> bool:
        """Learn from a response for a page's object; return whether its use needs no note.

        Without a time that can be trusted nothing is noted: a wrong one would ask for a note at
        every use.
        """
        with suppress(ProtocolError), self._lock:
            if time.monotonic() >= self._until:
                self._begin_period(self._clock.now(head))
            if modified_time(head) // self._period < self._present:
                return False
            self._add(key)
        return True

    def stored(self, key: PageKey) -> None:
        """Take note that a page's object was written just now."""
        with self._lock:
            if time.monotonic() < self._until:
                self._add(key)

    def has(self, key: PageKey) -> bool:
        """Tell whether nothing need be done about a use now."""
        with self._lock:
            return time.monotonic() < self._until and key.namespace + key.hash in self._keys

    def _begin_period(self, now: float) -> None:
        self._until = time.monotonic() + self._period - now % self._period
        if now // self._period != self._present:
            self._present = now // self._period
            self._keys.clear()

    def _add(self, key: PageKey) -> None:
        if len(self._keys) >= LIMIT:
            self._keys.clear()
        self._keys.add(key.namespace + key.hash)
