"""Rebuild the index from a listing of the bucket. No other operation lists all pages.

Also migrates a bucket of format 1, which has no index. Works shard by shard, and records which
shards are done, so that an interrupted rebuild can be continued.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import ObjectInfo
from memkv_sglang.tiers.minio.http import is_plausible
from memkv_sglang.tiers.minio.names import is_ours
from memkv_sglang.tiers.minio.retention.bucket_format import (
    SHARD_LIMIT,
    BucketFormat,
    read_format,
    write_format,
)
from memkv_sglang.tiers.minio.retention.parts import Parts
from memkv_sglang.tiers.minio.retention.shards import (
    PART,
    REPAIR,
    LeaseHeldError,
    Shard,
    ShardState,
)

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.retention.entries import Entries

HEADS_AT_ONCE = 256
"""Number of unknown objects whose metadata are checked in one round trip."""

HEADS_SECONDS = 30.0
"""Maximum seconds of such a check."""

LARGEST_SIZE = (1 << 32) - 2
"""Size that is recorded for larger objects. No page is this large."""

WAIT_SECONDS = 1.0
"""Seconds to wait while another node holds a shard."""

CLOCK_MARGIN = 120.0
"""Pages that were recorded less than this many seconds before the listing count as stored during
it."""

_NAMESPACE = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}")

_RECORD = re.compile(r"([0-9a-f]{2})\.json")
"""Name of a shard's record; see `shards`."""

Step = Callable[[str, int, int | None], None]


class Rebuilt(NamedTuple):
    """The result of a rebuild."""

    pages: int
    bytes: int
    foreign: int
    """Objects that have a page's name but are not pages. They stay, and are not in the index."""
    resumed: int
    """Number of shards that an earlier, interrupted rebuild had finished."""
    migrated: bool
    """Whether the bucket had format 1."""
    without_days: bool
    """Whether nodes no longer know after how many days the lifecycle rule removes pages."""


class _Progress(msgspec.Struct, kw_only=True):
    """The record of a rebuild that is under way."""

    shards: Annotated[int, msgspec.Meta(ge=1, le=SHARD_LIMIT)]
    done: list[Annotated[int, msgspec.Meta(ge=0, lt=SHARD_LIMIT)]] = []


class Rebuilder:
    """Rebuilds the index of a bucket. Calls block, and raise `TierError` or what a step raises."""

    def __init__(self, parts: Parts, config: CollectorConfig, shards: int | None = None) -> None:
        """Use the number of shards that the bucket has, or `shards` for a bucket of format 1."""
        self._parts = parts
        self._config = config
        self._wanted = shards
        self._name = f"{parts.names.root}collector/rebuild.json"
        self._foreign = 0

    def run(self, step: Step) -> Rebuilt:
        """List the bucket and replace the index. Raises `ConfigError` if `shards` is invalid."""
        parts = self._parts
        found = read_format(parts.records, parts.names)
        progress = self._read_progress()
        indexed = self._indexed_shards()
        shards = found.shards if found else indexed or self._wanted or BucketFormat().shards
        if self._wanted and self._wanted != shards:
            raise TierError(
                f"the index has {shards} shards, and their number can only be chosen while a "
                "bucket has no index; leave out --index-shards"
            )
        if progress is None or progress.shards != shards:
            progress = _Progress(shards=shards)
        resumed = len(progress.done)
        parts = self._parts = parts._replace(format=BucketFormat(shards=shards))
        namespaces = [
            folder
            for folder in parts.bucket.folders(parts.names.root)
            if _NAMESPACE.fullmatch(folder)
        ]
        for number in range(shards):
            step("shards", number, shards)
            if number not in progress.done:
                self._rebuild(number, namespaces, step)
                progress.done.append(number)
                parts.records.put(self._name, msgspec.json.encode(progress))
        states = [self._state(number) for number in range(shards)]
        write_format(
            parts.records,
            parts.names,
            lambda now: msgspec.structs.replace(now or BucketFormat(), shards=shards),
        )
        parts.bucket.remove([self._name, parts.names.format_1])
        return Rebuilt(
            sum(state.pages for state in states),
            sum(state.bytes for state in states),
            self._foreign,
            resumed,
            found is None and bool(namespaces) and not indexed,
            found is None,
        )

    def _indexed_shards(self) -> int:
        """Return the number of shards of the index, judging by their records; 0 without any."""
        prefix = self._parts.names.shards
        names = (item.name.removeprefix(prefix) for item in self._parts.bucket.objects(prefix))
        numbers = [int(found[1], 16) for found in map(_RECORD.fullmatch, names) if found]
        return 1 << max(numbers).bit_length() if numbers else 0

    def _read_progress(self) -> _Progress | None:
        content = self._parts.records.content(self._name, 1 << 16)
        try:
            return msgspec.json.decode(content or b"", type=_Progress)
        except (ValueError, RecursionError):
            return None

    def _shard(self, number: int) -> Shard:
        parts = self._parts
        return Shard(parts.records, parts.bucket, parts.names, number, self._config.lease_ttl)

    def _state(self, number: int) -> ShardState:
        shard = self._shard(number)
        shard.read()
        return shard.state

    def _rebuild(self, number: int, namespaces: Sequence[str], step: Step) -> None:
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import split
        from memkv_sglang.tiers.minio.retention.eviction import Summary, eviction_order

        shard = self._shard(number)
        self._acquire(shard, step)
        old = shard.state
        began = self._parts.records.clock(self._parts.names.format)
        logs = self._parts.logs.listed()
        known = self._known(shard, number)
        found = self._listed(shard, number, namespaces, known, step)
        found = _combine(known, found, began - CLOCK_MARGIN)
        summary = (
            Summary.of(eviction_order(found, self._config.use_period), found["size"])
            if len(found)
            else None
        )
        state = ShardState(
            parts=[shard.write_part(some) for some in split(found, PART)],
            summary=shard.write_summary(summary) if summary else "",
            logs=[log.name for log in logs],
            merged=old.merged,
            period=self._config.use_period,
            removed=old.removed,
            written=began,
            pages=int(np.count_nonzero(found["size"])),
            bytes=int(found["size"].sum(dtype="u8")),
        )
        shard.publish(state)
        self._parts.bucket.remove(shard.replaced(old))

    def _acquire(self, shard: Shard, step: Step) -> None:
        while True:
            try:
                return shard.acquire()
            except LeaseHeldError as error:
                step(f"waiting for {error.holder}, which collects a shard", 0, None)
                time.sleep(WAIT_SECONDS)

    def _known(self, shard: Shard, number: int) -> "Entries":
        """Return what index and logs say about a shard, as far as they can be read."""
        from memkv_sglang.tiers.minio.retention.entries import merge

        width = 256 // self._parts.format.shards
        merged = set(shard.state.logs)
        logs = [found for found in self._parts.logs.listed() if found.name not in merged]
        held = []
        for part in shard.state.parts:
            try:
                held.append(shard.entries(part))
            except TierError as error:  # damage may be the reason for this rebuild
                if REPAIR not in str(error):
                    raise
        return merge(*held, *self._parts.logs.read(logs, number * width, (number + 1) * width))

    def _listed(
        self,
        shard: Shard,
        number: int,
        namespaces: Sequence[str],
        known: "Entries",
        step: Step,
    ) -> "Entries":
        """Return the pages that the listing shows, with the time of their last write."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import empty

        batches = [empty()]
        objects = self._objects(number, namespaces)
        while items := list(islice(objects, HEADS_AT_ONCE)):
            batches.append(self._check(items, known))
            shard.renew()
            step("listed", sum(map(len, batches)), None)
        return np.concatenate(batches)

    def _objects(
        self, number: int, namespaces: Sequence[str]
    ) -> Iterator[tuple[PageKey, ObjectInfo]]:
        width = 256 // self._parts.format.shards
        for namespace in namespaces:
            for first in range(number * width, (number + 1) * width):
                prefix = f"{self._parts.names.root}{namespace}/{first:02x}/"
                for item in self._parts.bucket.objects(prefix):
                    key = self._parts.names.page_key(item.name)
                    if key is not None and is_plausible(item.modified):
                        yield key, item

    def _check(self, items: Sequence[tuple[PageKey, ObjectInfo]], known: "Entries") -> "Entries":
        """Return the entries of those objects that are pages."""
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import chosen, contained, entries

        found = entries(
            (
                key.namespace + key.hash,
                min(item.size, LARGEST_SIZE),
                int(item.modified),
                int(item.modified),
                # A chain's pages were written from the root on, so later ones are nearer to a leaf.
                int(item.modified % self._config.use_period * 1000),
            )
            for key, item in items
        )
        unknown = np.flatnonzero(~contained(found, known["key"])).tolist()
        heads = self._parts.records.heads(
            [items[i][1].name for i in unknown], time.monotonic() + HEADS_SECONDS
        )
        pages = np.ones(len(found), np.bool_)
        for i, head in zip(unknown, heads, strict=True):
            pages[i] = is_ours(head)
        self._foreign += int((~pages).sum())
        return chosen(found, pages)


def _combine(known: "Entries", listed: "Entries", since: float) -> "Entries":
    """Merge the listed pages with what is known about them, and with pages stored meanwhile."""
    import numpy as np

    from memkv_sglang.tiers.minio.retention.entries import UNKNOWN, contained, merge

    if len(known):
        fresh = ~contained(known, np.sort(listed["key"])) & (known["written"] >= since)
        of_listed = contained(known, np.sort(listed["key"]))
        positioned = known[of_listed & (known["position"] != UNKNOWN)]
        listed = listed.copy()
        listed["position"][contained(listed, positioned["key"])] = UNKNOWN  # the known one wins
        known = known[fresh | of_listed].copy()
        known["size"][contained(known, np.sort(listed["key"]))] = 0  # the listed one wins
    return merge(known, listed)
