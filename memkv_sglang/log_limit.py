"""Rate limit for log lines."""

import threading
import time
from collections.abc import Hashable

KINDS = 1000
"""Maximum number of kinds with a limit of their own."""

_OTHERS = object()
"""Stands for all further kinds, which share one limit."""


class LogLimit:
    """Admits a burst of lines of each kind, then one line per interval. Thread-safe.

    Uses the monotonic clock, so that setting the system clock neither silences nor floods the log.
    """

    def __init__(self, seconds: float, burst: int = 1) -> None:
        """Admit `burst` lines of a kind at once, and then one line every `seconds`."""
        self._seconds = seconds
        self._burst = burst
        self._lock = threading.Lock()
        # By kind: the time at which the full burst is available again, and the lines suppressed so
        # far.
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def admit(self, kind: Hashable) -> int | None:
        """Return None to suppress a line, else how many were suppressed since the last one."""
        now = time.monotonic()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= KINDS:
                self._forget_idle_kinds(now)
                if len(self._kinds) >= KINDS:
                    kind = _OTHERS
            full_at, suppressed = self._kinds.get(kind, (now, 0))
            full_at = max(full_at, now) + self._seconds
            if full_at - now > self._burst * self._seconds:
                self._kinds[kind] = full_at - self._seconds, suppressed + 1
                return None
            self._kinds[kind] = full_at, 0
            return suppressed

    def _forget_idle_kinds(self, now: float) -> None:
        self._kinds = {
            kind: (full_at, suppressed)
            for kind, (full_at, suppressed) in self._kinds.items()
            if full_at > now or kind is _OTHERS
        }
