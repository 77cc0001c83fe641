"""Pages that a client changed while the agent still read them."""

import logging
import threading
import time

from memkv_sglang.metrics import Metrics

log = logging.getLogger(__name__)

QUIET_SECONDS = 60.0
"""Time between two log lines: a client that does it once does it all the time."""


class ChangedPages:
    """Counts copies that were discarded because they failed their checksum. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        """Count in `memkv_changed_pages_total`."""
        self._metrics = metrics
        self._quiet_until = 0.0
        self._lock = threading.Lock()

    def report(self, copied_for: str, pages: int = 1) -> None:
        """Count the pages, and log the first of a while."""
        self._metrics.changed_pages.labels(copied_for.replace(" ", "_")).inc(pages)
        now = time.monotonic()
        with self._lock:
            if now < self._quiet_until:
                return
            self._quiet_until = now + QUIET_SECONDS
        fields = {"copied_for": copied_for}
        log.warning(
            "a client changed pages during its load, copies discarded", extra={"fields": fields}
        )
