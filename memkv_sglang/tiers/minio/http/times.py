"""Track the server's clock.

A proxy, a broken server or a captive portal can send any `Date`. A wrong one could make pages look
old, so that they are removed. So `ServerClock` never trusts a single response.
"""

import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from http import HTTPStatus

from memkv_sglang.tiers.minio.http.errors import ProtocolError
from memkv_sglang.tiers.minio.http.framing import ResponseHead

SKEW_LIMIT = 15 * 60.0
"""Clock skew in seconds beyond which S3 refuses signatures.

The server accepted this node's signature, so a `Date` that is further away is not the server's
time.
"""

TOLERANCE = 30.0
"""Maximum difference in seconds between readings that agree. The servers of a cluster may differ.
"""

EARLIEST = datetime(2020, 1, 1, tzinfo=UTC).timestamp()
"""Earliest plausible time of a page: no page is older than this project."""

_FIX = "run NTP on both machines, or look for a proxy that answers for MinIO"

_TRUSTED_STATUSES = frozenset({HTTPStatus.OK, HTTPStatus.NOT_FOUND})
"""Statuses whose `Date` is used. Other responses often come from proxies."""

_MONTHS = b"jan feb mar apr may jun jul aug sep oct nov dec".split()

_DATE = re.compile(
    rb"[a-z]{3}, (\d\d) ([a-z]{3}) (\d{4}) (\d\d):(\d\d):(\d\d) gmt"  # IMF-fixdate, lower case
)

_DATE_LENGTH = len("Sun, 06 Nov 1994 08:49:37 GMT")


def parse_date(value: bytes | None) -> float:
    """Return an HTTP date (RFC 9110, IMF-fixdate) as seconds since the epoch.

    Raises `ProtocolError` for any other value.
    """
    if value is None or len(value) != _DATE_LENGTH:
        raise ProtocolError(f"no date: {(value or b'')[:40]!r}")
    return _parse(value.lower())


@lru_cache(1024)  # cached, because pages that were written together have the same time
def _parse(value: bytes) -> float:
    match = _DATE.fullmatch(value)
    if match is None or match[2] not in _MONTHS:
        raise ProtocolError(f"no date: {value!r}")
    year, day, hour, minute, second = (int(match[i]) for i in (3, 1, 4, 5, 6))
    month = _MONTHS.index(match[2]) + 1
    try:
        return datetime(year, month, day, hour, minute, min(second, 59), tzinfo=UTC).timestamp()
    except ValueError as error:
        raise ProtocolError(f"no date: {value!r}") from error


def modified_time(head: ResponseHead) -> float:
    """Return when an object was last modified, by the server's clock. Raises `ProtocolError`."""
    modified = parse_date(head.field(b"last-modified"))
    if not is_plausible(modified):
        raise ProtocolError(f"Last-Modified before 2020: {head.field(b'last-modified')!r}")
    return modified


def is_plausible(modified: float) -> bool:
    """Return whether an object can have been modified at that time."""
    return modified >= EARLIEST


def _elapsed() -> float:
    # unlike the monotonic clock, it includes suspended time
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ServerClock:
    """Tracks the time of the bucket's servers. Thread-safe.

    A `Date` is trusted if its response is about an object, it is within `SKEW_LIMIT` of this node's
    clock, and an earlier reading or this node's clock agrees. Otherwise, the last trusted reading
    is used.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = _elapsed,
    ) -> None:
        """Start without a reading. Tests pass fake clocks."""
        self._wall = wall
        self._elapsed = elapsed
        self._lock = threading.Lock()
        self._start: float | None = None
        """The trusted reading: the server's time when `elapsed` was 0."""
        self._candidate: float | None = None
        self._reason = "no server has reported its time yet"

    def now(self, head: ResponseHead) -> float:
        """Return the server's Unix time, given a response that has just arrived.

        Raises `ProtocolError` while no reading can be trusted.
        """
        with self._lock:
            elapsed = self._elapsed()
            self._learn(head, elapsed)
            if self._start is None:
                raise ProtocolError(self._reason, _FIX)
            return self._start + elapsed

    def reading(self) -> float | None:
        """Return the server's time by the last trusted reading; None without one. Sends nothing."""
        with self._lock:
            return None if self._start is None else self._start + self._elapsed()

    def earliest(self, head: ResponseHead) -> float:
        """Return the earlier of the server's and this node's time, so nothing looks too old."""
        return min(self.now(head), self._wall())

    def _learn(self, head: ResponseHead, elapsed: float) -> None:
        if head.status not in _TRUSTED_STATUSES:
            return
        try:
            date = parse_date(head.field(b"date"))
        except ProtocolError:
            self._reason = "the server's Date cannot be read"
            return
        wall = self._wall()
        if abs(date - wall) > SKEW_LIMIT:
            self._reason = (
                f"the server's Date is {abs(date - wall):.0f} s from this node's clock, more than "
                "S3 allows"
            )
            return
        start = date - elapsed
        witnesses = (self._start, self._candidate, wall - elapsed)
        if any(seen is not None and abs(start - seen) <= TOLERANCE for seen in witnesses):
            self._start = start
        else:
            self._reason = "no second response has confirmed the server's time yet"
        self._candidate = start
