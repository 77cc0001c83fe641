"""The server's clock, as far as its answers can be trusted.

A proxy's answer, a broken server or a captive portal can carry any `Date`. A wrong one would make
pages look old and have them removed, so no single answer is believed: see `ServerClock`.
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
"""Seconds between this node's clock and the server's at which S3 refuses signatures.

The server accepted ours, so a `Date` further away is not its clock.
"""

TOLERANCE = 30.0
"""Seconds between two readings that agree: a cluster's servers differ by a little."""

EARLIEST = datetime(2020, 1, 1, tzinfo=UTC).timestamp()
"""No page is older than this project."""

_FIX = "run NTP on both machines, or look for a proxy that answers for MinIO"

_TELLING = frozenset({HTTPStatus.OK, HTTPStatus.NOT_FOUND})
"""Statuses of answers that say something about an object. Errors often come from proxies."""

_MONTHS = b"jan feb mar apr may jun jul aug sep oct nov dec".split()

_DATE = re.compile(
    rb"[a-z]{3}, (\d\d) ([a-z]{3}) (\d{4}) (\d\d):(\d\d):(\d\d) gmt"  # IMF-fixdate, lower case
)

_DATE_LENGTH = len("Sun, 06 Nov 1994 08:49:37 GMT")


def parse_date(value: bytes | None) -> float:
    """Return the seconds since the epoch that an HTTP date (RFC 9110, IMF-fixdate) names.

    Raises `ProtocolError` for anything else.
    """
    if value is None or len(value) != _DATE_LENGTH:
        raise ProtocolError(f"no date: {(value or b'')[:40]!r}")
    return _parse(value.lower())


@lru_cache(1024)  # pages that were written together have one time
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
    """Return when an object was written last, by the server's clock. Raises `ProtocolError`."""
    modified = parse_date(head.field(b"last-modified"))
    if not is_plausible(modified):
        raise ProtocolError(f"Last-Modified before 2020: {head.field(b'last-modified')!r}")
    return modified


def is_plausible(modified: float) -> bool:
    """Return whether an object can have been written then."""
    return modified >= EARLIEST


def _elapsed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # unlike monotonic, counts a suspended machine


class ServerClock:
    """The time of the bucket's servers. Thread-safe.

    A `Date` counts if its answer is about an object, if it is within `SKEW_LIMIT` of this node's
    clock, and if a second witness agrees: an earlier reading plus the time that has passed since,
    or this node's clock. Any other `Date` is ignored; the last trusted reading stands in for it.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = _elapsed,
    ) -> None:
        """Begin without a reading. Tests pass clocks of their own."""
        self._wall = wall
        self._elapsed = elapsed
        self._lock = threading.Lock()
        self._start: float | None = None
        """The trusted reading: server time when `elapsed` was 0."""
        self._unconfirmed: float | None = None
        self._doubt = "no server has told its time"

    def now(self, head: ResponseHead) -> float:
        """Return the server's time as of an answer that just came, in seconds since the epoch.

        Raises `ProtocolError` while no reading can be trusted.
        """
        with self._lock:
            elapsed = self._elapsed()
            self._learn(head, elapsed)
            if self._start is None:
                raise ProtocolError(self._doubt, _FIX)
            return self._start + elapsed

    def earliest(self, head: ResponseHead) -> float:
        """Return the server's time or this node's, whichever is earlier: nothing looks too old."""
        return min(self.now(head), self._wall())

    def _learn(self, head: ResponseHead, elapsed: float) -> None:
        if head.status not in _TELLING:
            return
        try:
            date = parse_date(head.field(b"date"))
        except ProtocolError:
            self._doubt = "the server tells no time that can be read"
            return
        wall = self._wall()
        if abs(date - wall) > SKEW_LIMIT:
            self._doubt = (
                f"the server's Date is {abs(date - wall):.0f} s from this node's clock, more than "
                "S3 allows"
            )
            return
        start = date - elapsed
        witnesses = (self._start, self._unconfirmed, wall - elapsed)
        if any(seen is not None and abs(start - seen) <= TOLERANCE for seen in witnesses):
            self._start = start
        else:
            self._doubt = "a second answer has not confirmed the server's time yet"
        self._unconfirmed = start
