"""Count the tier's events, and log its faults at a limited rate."""

import logging
import threading
from collections import Counter

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.tiers.minio.http import FALLBACK_REASONS

logger = logging.getLogger(__name__)

LOOKUP_FAILED, LOAD_FAILED, SPILL_FAILED = "lookup failed", "load failed", "spill failed"

OPERATIONS = frozenset({LOOKUP_FAILED, LOAD_FAILED, SPILL_FAILED})
"""Operations whose faults end when the operation succeeds again; see `succeeded`."""

PROBLEM_AFTER = 3
"""Number of consecutive failures of an operation after which the tier reports a problem."""

QUIET = 10.0
"""Minimum seconds between two log lines of one kind."""


class Telemetry:
    """Event counts since the start, and faults. Thread-safe."""

    def __init__(self) -> None:
        """Start with all counts at 0."""
        self._counts: Counter[str] = Counter()
        self._fallbacks = dict.fromkeys(FALLBACK_REASONS, 0)
        self._limit = LogLimit(QUIET)
        self._failing: dict[str, tuple[str, int]] = {}
        """The last reason and the number of consecutive failures of each failing operation."""
        self._lock = threading.Lock()

    def count(self, name: str, by: int = 1) -> None:
        """Add to the count of an event."""
        with self._lock:
            self._counts[name] += by

    def counts(self) -> dict[str, int]:
        """Return the counts by event; events that never happened are absent."""
        with self._lock:
            return dict(self._counts)

    def count_fallback(self, reason: str) -> None:
        """Count a page that the fast path left to the slow path."""
        with self._lock:
            self._fallbacks[reason] += 1

    def fallbacks(self) -> dict[str, int]:
        """Return the number of pages left to the slow path, by reason; 0 for unseen reasons."""
        with self._lock:
            return dict(self._fallbacks)

    def fault(self, event: str, error: Exception) -> None:
        """Count a fault. Logs at most one of its kind in `QUIET` seconds.

        A fault in `OPERATIONS` is logged again only for another reason, or after a success.
        """
        self.count(event.replace(" ", "_"))
        if event in OPERATIONS:
            with self._lock:
                reason, count = self._failing.get(event, ("", 0))
                self._failing[event] = str(error), count + 1
            if reason == str(error):
                return
        suppressed = self._limit.admit(event)
        if suppressed is not None:
            fields = {"reason": str(error), "count": suppressed + 1}
            logger.warning(f"minio {event}", extra={"fields": fields})

    def succeeded(self, event: str) -> None:
        """End the fault of an operation that has just succeeded."""
        if event in self._failing:
            with self._lock:
                self._failing.pop(event, None)

    def problem(self) -> str:
        """Return which operations keep failing, and why; empty if none does."""
        with self._lock:
            problems = [
                f"{event}: {reason}"
                for event, (reason, count) in self._failing.items()
                if count >= PROBLEM_AFTER
            ]
        return "; ".join(problems)
