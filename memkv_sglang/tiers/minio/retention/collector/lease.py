"""The lease that decides which node collects: an object with conditional writes."""

import os
import socket
import time
import uuid
from typing import Annotated

import msgspec

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import shown
from memkv_sglang.tiers.minio.retention.records import Record, Records, Written

RENEWALS = 3
"""Number of times that a lease is renewed in its duration."""

SIZE_LIMIT = 4096
"""Maximum size of a lease, in bytes."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class LeaseHeldError(TierError):
    """Another node holds the lease."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a collection."""

    pages: Count
    """Remaining pages."""
    bytes: Count
    removed_pages: Count
    removed_bytes: Count
    kept_pages: Count
    """Pinned pages."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The lease as stored."""

    holder: str
    seconds: float
    """How long the lease lasts without a renewal; 0 once released."""
    report: Report | None = None
    """Report of the last completed collection."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the lease."""

    holder: str = ""
    """The node that collects now; empty if none does."""
    ended: float | None = None
    """Seconds since the last collection ended; None during one, or if there was none."""
    report: Report | None = None


class Lease:
    """One node's view of the lease. Not thread-safe; calls block and raise `TierError`.

    Only the server's `Date` and `Last-Modified` decide whether it has expired. A holder that was
    suspended for longer than its lease notices before its next step, since it renews first.
    """

    def __init__(self, records: Records, name: str, seconds: float) -> None:
        """Take leases of `seconds`, stored in the object `name`."""
        self._records = records
        self._name = name
        self._seconds = seconds
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._version: str | None = None
        self._renewed = 0.0
        self._report: Report | None = None
        self.versioned = False
        """Whether the bucket keeps versions, according to the last write."""

    def state(self) -> State:
        """Read the holder, and the report of the last collection."""
        return self._judge(self._records.read(self._name, SIZE_LIMIT))

    def acquire(self) -> None:
        """Become the holder. Raises `LeaseHeldError` if another node holds the lease."""
        record = self._records.read(self._name, SIZE_LIMIT)
        state = self._judge(record)
        if state.holder:
            raise LeaseHeldError(f"another node is collecting ({shown(state.holder)})")
        self._report = state.report
        self._write(record.version if record else None, self._seconds)

    def renew(self) -> None:
        """Renew the lease if due; raises `LeaseHeldError` if another node took over."""
        if time.monotonic() - self._renewed >= self._seconds / RENEWALS:
            self._write(self._version, self._seconds)

    def release(self, report: Report | None) -> None:
        """Release the lease, and publish a report; None if the collection failed."""
        self._report = report or self._report
        self._write(self._version, 0.0)

    def _write(self, over: str | None, seconds: float) -> None:
        begin = time.monotonic()
        entry = _Entry(holder=self._holder, seconds=seconds, report=self._report)
        written: Written | None = self._records.write(self._name, msgspec.json.encode(entry), over)
        if written is None:
            raise LeaseHeldError("another node took over the collection")
        self._version, self.versioned = written
        self._renewed = begin

    def _judge(self, record: Record | None) -> State:
        """Return the state that a record describes.

        Its content is not trusted: no lease lasts longer than this node's own would.
        """
        entry = _parse(record)
        if record is None or entry is None:
            return State()
        if record.age < -self._seconds:  # written in the future
            return State(report=entry.report)
        if entry.seconds == 0:
            return State(ended=record.age, report=entry.report)
        holds = record.age <= min(entry.seconds, self._seconds)
        return State(holder=entry.holder if holds else "", report=entry.report)


def _parse(record: Record | None) -> _Entry | None:
    """Return the lease in a record; None if it is invalid, so that it will be overwritten."""
    if record is None or record.content is None:
        return None
    try:
        return msgspec.json.decode(record.content, type=_Entry)
    except (ValueError, RecursionError):
        return None
