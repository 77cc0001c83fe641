"""Counts of what the tier did, and log lines that do not flood."""

import logging
import threading
from collections import Counter

from memkv_sglang.log_limit import LogLimit

logger = logging.getLogger(__name__)

QUIET = 10.0
"""Seconds between two log lines of one kind."""


class Telemetry:
    """Named counts since the start, and faults. Safe for any number of threads."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self._counts: Counter[str] = Counter()
        self._limit = LogLimit(QUIET)
        self._lock = threading.Lock()

    def count(self, name: str, by: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._counts[name] += by

    def counts(self) -> dict[str, int]:
        """Return all counts so far by name; what never happened is not there."""
        with self._lock:
            return dict(self._counts)

    def fault(self, event: str, error: Exception) -> None:
        """Count a fault; log the first of its kind, and the next one after `QUIET` seconds."""
        self.count(event.replace(" ", "_"))
        left_out = self._limit.admit(event)
        if left_out is not None:
            fields = {"reason": str(error), "count": left_out + 1}
            logger.warning(f"minio {event}", extra={"fields": fields})
