"""Which node collects: the one that last wrote the lease, an object with conditional writes."""

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
"""A lease is renewed when this part of its time has passed."""

SIZE_LIMIT = 4096
"""Bytes of a lease at most."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class LeaseHeldError(TierError):
    """Another node collects, or took over."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection saw and did."""

    pages: Count
    """That are left."""
    bytes: Count
    removed_pages: Count
    removed_bytes: Count
    kept_pages: Count
    """That pins hold."""


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The lease as it is stored."""

    holder: str
    seconds: float
    """How long its holder may be silent; 0 once it has ended."""
    report: Report | None = None
    """Of the last collection that ended."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The lease as one node reads it."""

    holder: str = ""
    """Who collects now; empty if nobody does."""
    ended: float | None = None
    """Seconds since the last collection ended; None while one goes on, or if there was none."""
    report: Report | None = None


class Lease:
    """One node's view of the lease. Not thread-safe; calls block and raise `TierError`.

    Whether it has run out is told by the server's `Date` and `Last-Modified` alone. A holder that
    stood still for longer than its lease finds out before its next step, since it renews first.
    """

    def __init__(self, records: Records, name: str, seconds: float) -> None:
        """Take leases of so many seconds by the object `name`."""
        self._records = records
        self._name = name
        self._seconds = seconds
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._version: str | None = None
        self._renewed = 0.0
        self._report: Report | None = None
        self.versioned = False
        """Whether the bucket keeps versions, as the last write told."""

    def state(self) -> State:
        """Read who collects, and what the last collection saw."""
        return self._judge(self._records.read(self._name, SIZE_LIMIT))

    def acquire(self) -> None:
        """Become the holder; raises `LeaseHeldError` if another node is, or was faster."""
        record = self._records.read(self._name, SIZE_LIMIT)
        state = self._judge(record)
        if state.holder:
            raise LeaseHeldError(f"another node collects just now ({shown(state.holder)})")
        self._report = state.report
        self._write(record.version if record else None, self._seconds)

    def renew(self) -> None:
        """Call between all steps: raises `LeaseHeldError` once another node took over."""
        if time.monotonic() - self._renewed >= self._seconds / RENEWALS:
            self._write(self._version, self._seconds)

    def release(self, report: Report | None) -> None:
        """End it; every node can read what was seen, None if the collection failed."""
        self._report = report or self._report
        self._write(self._version, 0.0)

    def _write(self, over: str | None, seconds: float) -> None:
        begin = time.monotonic()
        entry = _Entry(holder=self._holder, seconds=seconds, report=self._report)
        written: Written | None = self._records.write(self._name, msgspec.json.encode(entry), over)
        if written is None:
            raise LeaseHeldError("another node has taken the collection over")
        self._version, self.versioned = written
        self._renewed = begin

    def _judge(self, record: Record | None) -> State:
        """Return what a record says, as far as it can be true.

        No lease holds for longer than this node's own would: the object may say anything.
        """
        entry = _parse(record)
        if record is None or entry is None:
            return State()
        if record.age < -self._seconds:  # of a time to come
            return State(report=entry.report)
        if entry.seconds == 0:
            return State(ended=record.age, report=entry.report)
        holds = record.age <= min(entry.seconds, self._seconds)
        return State(holder=entry.holder if holds else "", report=entry.report)


def _parse(record: Record | None) -> _Entry | None:
    """Return a lease, None for what is not one: it is not to be believed, but written over."""
    if record is None or record.content is None:
        return None
    try:
        return msgspec.json.decode(record.content, type=_Entry)
    except (ValueError, RecursionError):
        return None
