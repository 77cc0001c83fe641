"""The index of what the bucket holds, in shards by page hash.

A shard's record holds the shard's lease and names the parts that hold its entries. Parts are
written once. A node that merges logs into a shard writes new parts, then replaces the record. If
the node has lost the lease, replacing the record fails, and no node ever reads the new parts.
"""

import os
import socket
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import Bucket
from memkv_sglang.tiers.minio.http import shown
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.records import LIMIT, Record, Records

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.retention.entries import Entries
    from memkv_sglang.tiers.minio.retention.eviction import Summary

RENEWALS = 3
"""Number of times that a lease is renewed within its duration."""

PART = 1 << 16
"""Maximum number of entries in a part, which then has 4 MiB."""

SUMMARY_LIMIT = 1 << 20

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class LeaseHeldError(TierError):
    """Another node holds the lease."""

    def __init__(self, text: str, holder: str = "another node") -> None:
        """Name the holder, in printable form."""
        super().__init__(text)
        self.holder = holder


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a shard."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{1,60}$")]
    """Name of the object, below the prefix of the index."""
    first: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{96}$")]
    """The smallest key, in hex."""


class ShardState(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a shard."""

    holder: str = ""
    seconds: float = 0.0
    """Seconds that the lease lasts without a renewal; 0 after its release."""
    parts: Sequence[Part] = ()
    """The parts, sorted by key."""
    summary: str = ""
    """Name of the object with the `Summary`; empty if there are no pages."""
    logs: Sequence[Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f-]{1,60}$")]] = ()
    """Logs that were already merged, but still exist."""
    merged: Count = 0
    """Number of the last round that merged the logs."""
    removed: Count = 0
    """Number of the last round that removed pages."""
    period: float = 0.0
    """`collector.use_period` on which `summary` is based."""
    pins: str = ""
    """Version of the pins that `summary` takes into account."""
    written: float = 0.0
    """Server's time at which the oldest part was written."""
    pages: Count = 0
    bytes: Count = 0
    kept_pages: Count = 0
    """Pinned pages."""
    removed_pages: Count = 0
    """Number of pages that the round `removed` has removed."""
    removed_bytes: Count = 0


class Shard:
    """One node's view of a shard. Not thread-safe. Calls block, and raise `TierError`.

    Only the server's `Date` and `Last-Modified` decide whether its lease has expired. A holder that
    was suspended for longer than its lease notices this before its next step, because it renews the
    lease first.
    """

    def __init__(
        self, records: Records, bucket: Bucket, names: ObjectNames, number: int, seconds: float
    ) -> None:
        """Take leases of `seconds`."""
        self._records = records
        self._bucket = bucket
        self._index = names.index
        self._number = number
        self._name = f"{names.shards}{number:02x}.json"
        self._seconds = seconds
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._version: str | None = None
        self._renewed = 0.0
        self._written: tuple[str, Summary] | None = None
        """The last summary that this node wrote, with its name."""
        self.state = ShardState()
        self.damaged = False
        """Whether the record could not be parsed, so that the shard counts as empty."""

    def read(self) -> str:
        """Read the record into `state`; return who holds the lease, empty if no node does."""
        record = self._records.read(self._name, LIMIT)
        parsed = _parse(record)
        self.damaged = record is not None and parsed is None
        self.state = parsed or ShardState()
        self._version = record.version if record else None
        # the record seems to be written in the future
        if record is None or record.age < -self._seconds:
            return ""
        # The content is not trusted: no lease lasts longer than one of this node would.
        holds = record.age <= min(self.state.seconds, self._seconds) and self.state.seconds > 0
        return self.state.holder if holds else ""

    def acquire(self) -> None:
        """Read the record and take the lease. Raises `LeaseHeldError` if another node holds it."""
        self.demand_free(self.read())
        self.take()

    @staticmethod
    def demand_free(holder: str) -> None:
        """Raise `LeaseHeldError` if there is a holder, as returned by `read`."""
        if holder:
            name = shown(holder)
            raise LeaseHeldError(f"another node is collecting ({name})", name)

    def take(self) -> None:
        """Take the lease of the record last read, which must have been free.

        Raises `LeaseHeldError` if another node has changed the record meanwhile.
        """
        self._write(self.state, self._seconds)

    def renew(self) -> None:
        """Renew the lease if that is due. Raises `LeaseHeldError` if another node took over."""
        if time.monotonic() - self._renewed >= self._seconds / RENEWALS:
            self._write(self.state, self._seconds)

    def publish(self, state: ShardState) -> None:
        """Replace the record and release the lease."""
        self._write(state, 0.0)

    def release(self) -> None:
        """Release the lease without changing anything else."""
        self._write(self.state, 0.0)

    def _write(self, state: ShardState, seconds: float) -> None:
        begin = time.monotonic()
        state = msgspec.structs.replace(state, holder=self._holder, seconds=seconds)
        written = self._records.write(self._name, msgspec.json.encode(state), self._version)
        if written is None:
            raise LeaseHeldError("another node took over the collection of a shard")
        self.state = state
        self._version = written
        self._renewed = begin

    def entries(self, part: Part) -> "Entries":
        """Read a part. Raises `TierError` if it is missing or damaged."""
        from memkv_sglang.tiers.minio.retention.entries import (
            SIZE_LIMIT,
            DamagedError,
            by_key,
            decode,
        )

        content = self._records.content(self._index + part.name, SIZE_LIMIT)
        try:
            found = decode(content) if content is not None else None
        except DamagedError as error:
            raise TierError(f"part {part.name} of the index: {error}; {REPAIR}") from error
        if found is None:
            raise MissingPartError(f"part {part.name} of the index is missing; {REPAIR}")
        return by_key(found)

    def summary(self) -> "Summary":
        """Read the summary of the state. Raises `TierError` if it is missing or damaged."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.eviction import Summary

        if not self.state.summary:
            return Summary.of(np.empty(0, np.uint64), np.empty(0, np.uint32))
        if self._written is not None and self._written[0] == self.state.summary:
            return self._written[1]
        content = self._records.content(self._index + self.state.summary, SUMMARY_LIMIT)
        try:
            return Summary.decode(content or b"x")
        except ValueError as error:
            raise TierError(f"summary of a shard: {error}; {REPAIR}") from error

    def write_part(self, found: "Entries") -> Part:
        """Store sorted entries as a new part."""
        from memkv_sglang.tiers.minio.retention.entries import encode, key_bytes

        name = self._new_name()
        self._records.put(self._index + name, encode(found))
        return Part(name=name, first=key_bytes(found[:1])[0].hex())

    def write_summary(self, summary: "Summary") -> str:
        """Store a summary; return the name of its object."""
        name = self._new_name()
        self._records.put(self._index + name, summary.encode())
        self._written = name, summary
        return name

    def replaced(self, old: ShardState) -> list[str]:
        """Return the names of the objects that `old` names and the current state does not."""
        return [self._index + name for name in _objects(old) - _objects(self.state)]

    def remove_orphans(self, now: float) -> None:
        """Remove objects of this shard that a node left behind when it died. Needs the lease."""
        used, old = _objects(self.state), now - ORPHAN_SECONDS
        listed = self._bucket.objects(f"{self._index}{self._number:02x}-")
        self._bucket.remove(
            item.name
            for item in listed
            if item.name.removeprefix(self._index) not in used and item.modified < old
        )

    def _new_name(self) -> str:
        return f"{self._number:02x}-{uuid.uuid4().hex}"


REPAIR = "run `memkv bucket rebuild`"

ORPHAN_SECONDS = 86400.0
"""Seconds after which an object that no record names will not be named by one any more."""


class MissingPartError(TierError):
    """A part is missing, probably because another node has replaced it."""


def _objects(state: ShardState) -> set[str]:
    return {part.name for part in state.parts} | ({state.summary} if state.summary else set())


def _parse(record: Record | None) -> ShardState | None:
    """Return the state in a record; None if it is invalid, and so will be overwritten."""
    if record is None or record.content is None:
        return None
    try:
        return msgspec.json.decode(record.content, type=ShardState)
    except (ValueError, RecursionError):
        return None
