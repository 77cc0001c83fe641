"""Report pages that a client changed while the agent was reading them."""

import logging
import threading
import time

from memkv_sglang.metrics import Metrics

log = logging.getLogger(__name__)

LOG_INTERVAL = 60.0
"""Seconds between log lines. A client that does this once does it all the time."""


class ChangedPages:
    """Counts and logs copies that were discarded because of a wrong checksum. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        """Count the copies in `memkv_changed_pages_total`."""
        self._metrics = metrics
        self._silent_until = 0.0
        self._lock = threading.Lock()

    def report(self, copied_for: str, pages: int = 1) -> None:
        """Count the pages, and log them unless others were logged recently."""
        self._metrics.changed_pages.labels(copied_for.replace(" ", "_")).inc(pages)
        now = time.monotonic()
        with self._lock:
            if now < self._silent_until:
                return
            self._silent_until = now + LOG_INTERVAL
        fields = {"copied_for": copied_for}
        log.warning(
            "client changed pages during its load, copies discarded", extra={"fields": fields}
        )
