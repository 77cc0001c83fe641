"""Which node collects: the one that last wrote the lease, an object with conditional writes."""

import os
import socket
import time
import uuid

import msgspec

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.records import Record, Records, Written

RENEWALS = 3
"""A lease is renewed when this part of its time has passed."""


class LeaseHeldError(TierError):
    """Another node collects, or took over."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection saw and did."""

    pages: int
    """That are left."""
    bytes: int
    removed_pages: int
    removed_bytes: int
    kept_pages: int
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
        return _state(self._records.read(self._name))

    def acquire(self) -> None:
        """Become the holder; raises `LeaseHeldError` if another node is, or was faster."""
        record = self._records.read(self._name)
        state = _state(record)
        if state.holder:
            raise LeaseHeldError(f"another node collects just now ({state.holder})")
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


def _state(record: Record | None) -> State:
    if record is None:
        return State()
    try:
        entry = msgspec.json.decode(record.content, type=_Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return State()  # not ours to believe, but to be written over
    if entry.seconds == 0:
        return State(ended=record.age, report=entry.report)
    holds = record.age <= entry.seconds
    return State(holder=entry.holder if holds else "", report=entry.report)
