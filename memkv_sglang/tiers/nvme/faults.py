"""What the tier does about a disk that fails: says so once, and stops writing for a while."""

import logging
import threading
import time

PAUSE = 30.0
"""Seconds without writes after a write failed; also between two lines about one kind of fault."""

_log = logging.getLogger(__name__)


class FaultLog:
    """Logs each kind of fault at most once in `PAUSE` seconds."""

    def __init__(self) -> None:
        self._silent_until: dict[str, float] = {}
        self._lock = threading.Lock()

    def report(self, event: str, **fields: object) -> None:
        """Log the event as a warning, unless it was logged just before."""
        now = time.monotonic()
        with self._lock:
            if now < self._silent_until.get(event, 0.0):
                return
            self._silent_until[event] = now + PAUSE
        _log.warning(event, extra={"fields": fields})


class WriteGate:
    """Closed for `PAUSE` seconds by a failed write: the disk is full, read-only or broken."""

    def __init__(self, faults: FaultLog) -> None:
        """Begin open."""
        self._faults = faults
        self._closed_until = 0.0
        self.problem = ""
        """Why the last page was not written; empty if it was."""

    @property
    def is_open(self) -> bool:
        """Tell whether writes are worth a try."""
        return time.monotonic() >= self._closed_until

    def succeed(self) -> None:
        """Take note of a write that went well."""
        if self.problem and self.is_open:
            self.problem = ""

    def refuse(self, reason: str) -> None:
        """Take note of a page that found no room; others may find some."""
        self.problem = reason

    def close(self, error: OSError) -> None:
        """Stop writing for a while."""
        self._closed_until = time.monotonic() + PAUSE
        if str(error) != self.problem:  # logged once, until it changes or is over
            self._faults.report("disk takes no pages", error=str(error), pause_s=PAUSE)
        self.problem = str(error)
