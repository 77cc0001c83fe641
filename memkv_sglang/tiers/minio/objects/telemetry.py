"""Counts of what the tier did, and log lines that do not flood."""

import logging
import threading
from collections import Counter

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.tiers.minio.http import FALLBACK_REASONS

logger = logging.getLogger(__name__)

LOOKUP_FAILED, LOAD_FAILED, SPILL_FAILED = "lookup failed", "load failed", "spill failed"

OPERATIONS = frozenset({LOOKUP_FAILED, LOAD_FAILED, SPILL_FAILED})
"""Faults that end with the next call of their kind that succeeds: see `succeeded`."""

LASTING = 3
"""How often in a row one of them means that the tier does not work."""

QUIET = 10.0
"""Seconds between two log lines of one kind."""


class Telemetry:
    """Named counts since the start, and faults. Safe for any number of threads."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self._counts: Counter[str] = Counter()
        self._fallbacks = dict.fromkeys(FALLBACK_REASONS, 0)
        self._limit = LogLimit(QUIET)
        self._failing: dict[str, tuple[str, int]] = {}
        """Of each operation that fails: the last reason, and how often in a row it failed."""
        self._lock = threading.Lock()

    def count(self, name: str, by: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._counts[name] += by

    def counts(self) -> dict[str, int]:
        """Return all counts so far by name; what never happened is not there."""
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
        """Count a fault; log the first of its kind, and the next one after `QUIET` seconds.

        One of `OPERATIONS` is logged again only with another reason, or once it was over.
        """
        self.count(event.replace(" ", "_"))
        if event in OPERATIONS:
            with self._lock:
                reason, row = self._failing.get(event, ("", 0))
                self._failing[event] = str(error), row + 1
            if reason == str(error):
                return
        left_out = self._limit.admit(event)
        if left_out is not None:
            fields = {"reason": str(error), "count": left_out + 1}
            logger.warning(f"minio {event}", extra={"fields": fields})

    def succeeded(self, event: str) -> None:
        """End the fault of an operation that has just succeeded."""
        if event in self._failing:
            with self._lock:
                self._failing.pop(event, None)

    def problem(self) -> str:
        """Return which operations fail, and why; empty if none does."""
        with self._lock:
            lasting = [
                f"{event}: {reason}"
                for event, (reason, row) in self._failing.items()
                if row >= LASTING
            ]
        return "; ".join(lasting)
