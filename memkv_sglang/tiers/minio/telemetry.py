"""Counts of what the tier did, and log lines that do not flood."""

import logging
import threading
import time
from collections import Counter

logger = logging.getLogger(__name__)

QUIET = 10.0
"""Seconds between two log lines of one kind."""


class Telemetry:
    """Named counts since the start, and faults. Safe for any number of threads."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self._counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}
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
        name, now = event.replace(" ", "_"), time.monotonic()
        with self._lock:
            self._counts[name] += 1
            last, logged = self._logged.get(event, (-QUIET, 0))
            if now - last < QUIET:
                return
            total = self._counts[name]
            self._logged[event] = now, total
        fields = {"reason": str(error), "count": total - logged}
        logger.warning(f"minio {event}", extra={"fields": fields})
