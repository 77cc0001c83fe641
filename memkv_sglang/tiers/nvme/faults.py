"""What the tier does about a disk that fails: says so once, and stops writing for a while."""

import logging
import threading
import time
from collections.abc import Callable

from memkv_sglang.log_limit import LogLimit

PAUSE = 30.0
"""Seconds without writes after a write failed; also between two lines about one kind of fault."""

_LOOK_EVERY = 0.25
"""Seconds for which the directory is trusted to be where it was seen."""

_log = logging.getLogger(__name__)


class FaultLog:
    """Logs each kind of fault at most once in `PAUSE` seconds."""

    def __init__(self) -> None:
        self._limit = LogLimit(PAUSE)

    def report(self, event: str, **fields: object) -> None:
        """Log the event as a warning, unless it was logged just before."""
        if self._limit.admit(event) is not None:
            _log.warning(event, extra={"fields": fields})


class WriteGate:
    """Closed for `PAUSE` seconds by a failed write: the disk is full, read-only or broken.

    Also closed while the directory is not at its path: the next start would not find new pages.
    """

    def __init__(self, faults: FaultLog, displacement: Callable[[], str] = lambda: "") -> None:
        """Begin open. `displacement` returns why the directory is not at its path, or nothing."""
        self._faults = faults
        self._closed_until = 0.0
        self._failure = ""
        self._displacement = displacement
        self._displaced = ""
        self._look_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Tell whether writes are worth a try."""
        return not self._whereabouts() and time.monotonic() >= self._closed_until

    @property
    def problem(self) -> str:
        """Why the last page was not written, or why none would be; empty if there is no reason."""
        return self._whereabouts() or self._failure

    def _whereabouts(self) -> str:
        """Return why the directory is not at its path, or nothing."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look(now)
        return self._displaced

    def _look(self, now: float) -> None:
        with self._lock:
            if now < self._look_at:
                return
            self._look_at = now + _LOOK_EVERY
            displaced = self._reason()
            if displaced == self._displaced:
                return
            self._displaced = displaced
        if displaced:
            _log.error("disk takes no pages", extra={"fields": {"reason": displaced}})
        else:
            _log.info("disk takes pages again")

    def _reason(self) -> str:
        try:
            return self._displacement()
        except OSError as error:
            return str(error)

    def succeed(self) -> None:
        """Take note of a write that went well."""
        if self._failure and self.is_open:
            self._failure = ""

    def refuse(self, reason: str) -> None:
        """Take note of a page that found no room; others may find some."""
        self._failure = reason

    def close(self, error: OSError) -> None:
        """Stop writing for a while."""
        self._closed_until = time.monotonic() + PAUSE
        if str(error) != self._failure:  # logged once, until it changes or is over
            self._faults.report("disk takes no pages", error=str(error), pause_s=PAUSE)
        self._failure = str(error)
