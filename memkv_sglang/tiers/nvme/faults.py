"""What the tier does about a disk that fails: says so once, and stops writing for a while."""

import logging
import time

from memkv_sglang.log_limit import LogLimit

PAUSE = 30.0
"""Seconds without writes after a write failed; also between two lines about one kind of fault."""

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
    """Closed for `PAUSE` seconds by a failed write: the disk is full, read-only or broken."""

    def __init__(self, faults: FaultLog) -> None:
        """Begin open."""
        self._faults = faults
        self._closed_until = 0.0

    @property
    def is_open(self) -> bool:
        """Tell whether writes are worth a try."""
        return time.monotonic() >= self._closed_until

    def close(self, error: OSError) -> None:
        """Stop writing for a while."""
        self._closed_until = time.monotonic() + PAUSE
        self._faults.report("disk takes no pages", error=str(error), pause_s=PAUSE)
