"""The nodes' logs: write-once objects that say which pages a node has stored, used and removed."""

import logging
import re
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memkv_sglang.tiers.minio.admin import Bucket
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.objects import Telemetry
from memkv_sglang.tiers.minio.retention.records import Records

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.retention.entries import Entries, Head

log = logging.getLogger(__name__)

LISTED_LIMIT = 20_000
"""Maximum number of logs that one pass reads. The next pass reads the others."""

LISTED_BYTES = 4 << 30
"""Maximum bytes of those logs in total. With 16 shards, each pass reads a sixteenth of them."""

CACHE_LIMIT = 64 << 20
"""Logs of up to this many bytes in total are read whole, once for all shards. Larger ones are read
slice by slice."""

_NAME = re.compile(r"(\d{10})-[0-9a-f]{32}(?:-([0-9a-f]{1,13}))?")


class LogName(NamedTuple):
    """A log in the bucket."""

    name: str
    """Name without the prefix.

    It consists of the time, a random number, and the bytes of the pages that the log says were
    stored, so a listing shows whether the bucket exceeds its capacity.
    """
    size: int
    """Bytes."""
    written: int
    """When it was written, by the server's clock."""
    stored: int
    """Bytes of the stored pages."""


class LogStore:
    """The logs of a bucket. Not thread-safe. Calls block, and raise `TierError`."""

    def __init__(
        self, bucket: Bucket, records: Records, names: ObjectNames, telemetry: Telemetry
    ) -> None:
        """Keep the logs next to the pages."""
        self._bucket = bucket
        self._records = records
        self._prefix = names.logs
        self._telemetry = telemetry
        self._whole: dict[str, Entries | None] = {}
        self._heads: dict[str, Head | None] = {}
        self._cached_bytes = 0
        self.truncated = False
        """Whether `listed` left logs out the last time, so that some uses are not known."""

    def write(self, found: "Entries", now: float) -> None:
        """Store a log. Its name begins with `now`, the server's time, so names sort by time."""
        from memkv_sglang.tiers.minio.retention.entries import encode, stored_sizes

        stored = int(stored_sizes(found).sum(dtype="u8"))
        name = f"{self._prefix}{int(now):010d}-{uuid.uuid4().hex}-{stored:x}"
        self._records.put(name, encode(found))
        self._telemetry.count("logs_written")
        self._telemetry.count("log_entries_written", len(found))

    def listed(self) -> Sequence[LogName]:
        """Return the logs, oldest first. Records whether there are more than the limits allow.

        Takes one request per 1,000 logs. Ignores foreign objects.
        """
        found: list[LogName] = []
        total, self.truncated = 0, False
        for item in self._bucket.objects(self._prefix):
            name = item.name.removeprefix(self._prefix)
            parts = _NAME.fullmatch(name)
            if parts is None:
                continue
            one = LogName(name, item.size, int(parts[1]), int(parts[2] or "0", 16))
            total += one.size
            if found and (len(found) == LISTED_LIMIT or total > LISTED_BYTES):
                self.truncated = True
                break
            found.append(one)
        known = {log.name for log in found}
        for name in self._whole.keys() - known:
            del self._whole[name]
        for name in self._heads.keys() - known:
            del self._heads[name]
        self._cached_bytes = sum(log.size for log in found if log.name in self._whole)
        return found

    def read(
        self,
        logs: Sequence[LogName],
        first: int,
        last: int,
        each: Callable[[int], None] = lambda _: None,
    ) -> "list[Entries]":
        """Return the entries of the slices [first, last) of each log.

        A damaged log counts as empty, and is logged once. `each` is called before each log, with
        the number of logs read so far.
        """
        whole = sum(log.size for log in logs) <= CACHE_LIMIT
        read = []
        for count, log in enumerate(logs):
            each(count)
            found = self._read(log, first, last, whole=whole)
            if found is not None and len(found):
                read.append(found)
        return read

    def _read(self, log: LogName, first: int, last: int, *, whole: bool) -> "Entries | None":
        from memkv_sglang.tiers.minio.retention.entries import DamagedError, first_bytes

        try:
            if not whole and log.name not in self._whole:
                return self._read_slices(log, first, last)
            if log.name not in self._whole:
                self._whole[log.name] = self._read_whole(log)
                self._cached_bytes += log.size
        except DamagedError as error:
            self._report(log, error)
            self._whole[log.name] = self._heads[log.name] = None
        found = self._whole[log.name]
        if found is None:
            return None
        begin, end = first_bytes(found).searchsorted([first, last])
        return found[begin:end]

    def _read_whole(self, log: LogName) -> "Entries | None":
        from memkv_sglang.tiers.minio.retention.entries import SIZE_LIMIT, decode

        content = self._records.content(self._prefix + log.name, SIZE_LIMIT)
        return decode(content) if content is not None else None

    def _read_slices(self, log: LogName, first: int, last: int) -> "Entries | None":
        from memkv_sglang.tiers.minio.retention.entries import HEADER_SIZE, SIZE_LIMIT, Head

        name = self._prefix + log.name
        if log.name not in self._heads:
            content = self._records.content(name, HEADER_SIZE, (0, HEADER_SIZE))
            self._heads[log.name] = Head.parse(content) if content is not None else None
        head = self._heads[log.name]
        if head is None:
            return None
        begin, end = head.span(first, last)
        if begin == end:
            return None
        content = self._records.content(name, SIZE_LIMIT, (begin, end))
        return head.decode(first, last, content) if content is not None else None

    def _report(self, damaged: LogName, error: Exception) -> None:
        self._telemetry.count("damaged_logs")
        fields = {"log": damaged.name, "reason": str(error)}
        log.warning("damaged log skipped; its pages count as unused", extra={"fields": fields})

    def remove(self, names: Sequence[str]) -> None:
        """Remove logs that every shard has merged."""
        self._bucket.remove(self._prefix + name for name in names)

    @property
    def cached_bytes(self) -> int:
        """Bytes of memory that the logs take that were read whole."""
        return self._cached_bytes

    def forget(self) -> None:
        """Free the memory of all logs that were read."""
        self._whole.clear()
        self._heads.clear()
        self._cached_bytes = 0
