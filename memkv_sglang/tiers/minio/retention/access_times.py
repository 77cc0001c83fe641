"""Remembers the pages whose use in the current period is already recorded in the bucket."""

import threading
import time
from contextlib import suppress

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.minio.http import ProtocolError, ResponseHead, ServerClock, modified_time

LIMIT = 500_000
"""Maximum number of remembered pages; about 60 MB."""


class AccessTimeCache:
    """Pages with an up-to-date access time. Periods follow the server's clock. Thread-safe."""

    def __init__(self, period: float, clock: ServerClock) -> None:
        """Use periods of `period` seconds."""
        self._period = period
        self._clock = clock
        self._keys: set[bytes] = set()
        self._period_number = -1.0
        self._until = 0.0
        self._lock = threading.Lock()

    def saw(self, key: PageKey, head: ResponseHead) -> bool:
        """Learn from a response for a page; return whether its access time needs no update.

        Returns True while the server's time cannot be trusted, since a wrong time would cause an
        update at every use.
        """
        with suppress(ProtocolError), self._lock:
            if time.monotonic() >= self._until:
                self._begin_period(self._clock.now(head))
            if modified_time(head) // self._period < self._period_number:
                return False
            self._add(key)
        return True

    def stored(self, key: PageKey) -> None:
        """Record that a page was just written."""
        with self._lock:
            if time.monotonic() < self._until:
                self._add(key)

    def has(self, key: PageKey) -> bool:
        """Return whether the use of a page needs no update in the current period."""
        with self._lock:
            return time.monotonic() < self._until and key.namespace + key.hash in self._keys

    def _begin_period(self, now: float) -> None:
        self._until = time.monotonic() + self._period - now % self._period
        if now // self._period != self._period_number:
            self._period_number = now // self._period
            self._keys.clear()

    def _add(self, key: PageKey) -> None:
        if len(self._keys) >= LIMIT:
            self._keys.clear()
        self._keys.add(key.namespace + key.hash)
