"""One limit for everything that could flood a log."""

import threading
import time
from collections.abc import Hashable

KINDS = 1000
"""Kinds of lines told apart."""

_OTHERS = object()
"""Stands for every kind beyond `KINDS`."""


class LogLimit:
    """Lets a burst of lines of each kind pass, then one line every few seconds. Thread-safe.

    Goes by the monotonic clock, so setting the system's clock neither silences nor floods a log.
    """

    def __init__(self, seconds: float, burst: int = 1) -> None:
        """Allow `burst` lines of a kind at once and one more every `seconds`."""
        self._seconds = seconds
        self._burst = burst
        self._lock = threading.Lock()
        # By kind: when the whole burst will be allowed again, and the lines left out so far.
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def admit(self, kind: Hashable) -> int | None:
        """Count a line; return None to leave it out, else the lines of its kind left out before."""
        now = time.monotonic()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= KINDS:
                self._forget_idle(now)
                if len(self._kinds) >= KINDS:
                    kind = _OTHERS
            full_at, left_out = self._kinds.get(kind, (now, 0))
            full_at = max(full_at, now) + self._seconds
            if full_at - now > self._burst * self._seconds:
                self._kinds[kind] = full_at - self._seconds, left_out + 1
                return None
            self._kinds[kind] = full_at, 0
            return left_out

    def _forget_idle(self, now: float) -> None:
        self._kinds = {
            kind: (full_at, left_out)
            for kind, (full_at, left_out) in self._kinds.items()
            if full_at > now or kind is _OTHERS
        }
