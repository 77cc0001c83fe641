"""Handle disk faults: log each kind once and pause writing."""

import logging
import threading
import time
from collections.abc import Callable

from memkv_sglang.log_limit import LogLimit

PAUSE = 30.0
"""Seconds without writes after a failed write, and between two log lines about one kind of fault.
"""

_CHECK_INTERVAL = 0.25
"""Seconds between checks that the directory is still at its path."""

_log = logging.getLogger(__name__)


class FaultLog:
    """Logs each kind of fault at most once per `PAUSE`."""

    def __init__(self) -> None:
        self._limit = LogLimit(PAUSE)

    def report(self, event: str, **fields: object) -> None:
        """Log the event as a warning, unless it was logged less than `PAUSE` ago."""
        if self._limit.admit(event) is not None:
            _log.warning(event, extra={"fields": fields})


class WriteGate:
    """Decides whether to write. Closed for `PAUSE` after a failed write.

    Also closed while the directory is not at its path, because the next start would not find pages
    that are written now.
    """

    def __init__(self, faults: FaultLog, displacement: Callable[[], str] = lambda: "") -> None:
        """Start open. `displacement` returns why the directory is not at its path, or empty."""
        self._faults = faults
        self._closed_until = 0.0
        self._failure = ""
        self._displacement = displacement
        self._displaced = ""
        self._check_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether to attempt writes."""
        return not self._current_displacement() and time.monotonic() >= self._closed_until

    @property
    def problem(self) -> str:
        """Why the last page was not written or none can be written now; empty if writes work."""
        return self._current_displacement() or self._failure

    def _current_displacement(self) -> str:
        now = time.monotonic()
        if now >= self._check_at:
            self._check_displacement(now)
        return self._displaced

    def _check_displacement(self, now: float) -> None:
        with self._lock:
            if now < self._check_at:
                return
            self._check_at = now + _CHECK_INTERVAL
            displaced = self._find_displacement()
            if displaced == self._displaced:
                return
            self._displaced = displaced
        if displaced:
            _log.error("disk accepts no pages", extra={"fields": {"reason": displaced}})
        else:
            _log.info("disk accepts pages again")

    def _find_displacement(self) -> str:
        try:
            return self._displacement()
        except OSError as error:
            return str(error)

    def record_success(self) -> None:
        """Record a successful write."""
        if self._failure and self.is_open:
            self._failure = ""

    def record_refusal(self, reason: str) -> None:
        """Record why there was no slot for a page. Keeps the gate open: other pages may fit."""
        self._failure = reason

    def close(self, error: OSError) -> None:
        """Stop writing for `PAUSE` seconds."""
        self._closed_until = time.monotonic() + PAUSE
        if str(error) != self._failure:  # Log each fault once, until it changes or ends.
            self._faults.report("disk accepts no pages", error=str(error), pause_s=PAUSE)
        self._failure = str(error)
