"""The record of the round of collection that all nodes of a bucket work on together.

A round merges the logs into every shard, decides once for the whole bucket which pages to remove,
waits until every node has logged its uses, and removes those of the pages that are still unused.
"""

from typing import Annotated, Literal

import msgspec

from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.records import Record, Records

SIZE_LIMIT = 64 << 10
"""Maximum size of the record, in bytes."""

GRACE_LIMIT = 43200.0
"""Maximum seconds between the decision which pages to remove and their removal.

Half of the longest `collector.interval`.
"""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Order = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a round."""

    pages: Count
    """Remaining pages."""
    bytes: Count
    removed_pages: Count
    removed_bytes: Count
    kept_pages: Count
    """Pinned pages."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a round."""

    number: Count = 0
    phase: Literal["merge", "remove", "done"] = "done"
    period: Annotated[float, msgspec.Meta(ge=1, le=1e9)] = 3600.0
    """`collector.use_period` of the node that began the round."""
    remove_at: Seconds = 0.0
    """Server's time from which pages may be removed. Every node logs its uses right then."""
    order: Order = 0
    """Pages before this place in the order are removed; see `eviction`."""
    quotas: Annotated[list[Count], msgspec.Meta(max_length=256)] = []
    """Bytes to remove at `order` itself, by shard."""
    report: Report | None = None
    """Report of the last round that has ended."""
    oldest: Order = 0
    """When that round ended, only pinned pages preceded this place in the order."""


class StoredRound:
    """The record in the bucket, as this node last read it. Calls block, and raise `TierError`."""

    def __init__(self, records: Records, names: ObjectNames) -> None:
        """Start without reading the record."""
        self._records = records
        self._name = names.round
        self._version: str | None = None
        self.current = Round()
        self.age = float("inf")
        """Seconds since the record was written, by the server's clock."""
        self.now = 0.0
        """The server's time when the record was read."""

    def read(self) -> Round:
        """Read the record. A missing or damaged one counts as a round that ended long ago."""
        record = self._records.read(self._name, SIZE_LIMIT)
        self._version = record.version if record else None
        parsed = _parse(record) if record else None
        self.age = record.age if record and parsed else float("inf")
        self.now = record.written + record.age if record else 0.0
        self.current = parsed or Round(number=self.current.number)
        return self.current

    def replace(self, changed: Round) -> bool:
        """Replace the record. Returns False, and writes nothing, if another node has changed it."""
        written = self._records.write(self._name, msgspec.json.encode(changed), self._version)
        if written is None:
            return False
        self._version, self.current, self.age = written, changed, 0.0
        return True


def _parse(record: Record) -> Round | None:
    """Return the round in a record; None if it is invalid, so that it will be overwritten."""
    try:
        found = msgspec.json.decode(record.content or b"", type=Round)
    except (ValueError, RecursionError):
        return None
    # All nodes would wait for such a time.
    return None if found.remove_at > record.written + GRACE_LIMIT else found
