"""One collection: count what is there, remove what has to leave, in the order of `order`."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.minio.bucket import Bucket
from memkv_sglang.tiers.minio.collector.lease import Report
from memkv_sglang.tiers.minio.collector.order import FirstToLeave, StoredPage, leaving_order
from memkv_sglang.tiers.minio.objects import ObjectNames
from memkv_sglang.tiers.minio.pins import PinStore
from memkv_sglang.tiers.minio.records import Records
from memkv_sglang.tiers.minio.times import is_plausible

log = logging.getLogger(__name__)

LOW_WATERMARK = 0.95
"""Share of the capacity at which a collection ends."""

ROUND_LIMIT = 250_000
"""Pages that one listing may condemn, some 60 MB of memory; more of them take another listing."""

REMOVED_AT_ONCE = 250
"""Objects of one request, few enough to be removed well within a request's time."""

REMOVERS = 4
"""Requests at a time."""

QUARANTINE_SECONDS = 7 * 86400.0
"""How long a corrupt copy is kept for who wants to look at it."""

Step = Callable[[str, int, int | None], None]
"""Called between all steps with what is done, how much of it, of how many (None: not known).

May raise to end the collection there, or sleep to leave the processor to others.
"""


class Collection(NamedTuple):
    """What was seen, and what left or, in a dry run, would leave."""

    report: Report
    satisfied: bool
    """False if pins hold more than the limits allow."""


class Collector:
    """Calls block, and raise `TierError` and what a step raises; pages removed by then are gone."""

    def __init__(
        self,
        bucket: Bucket,
        records: Records,
        names: ObjectNames,
        config: CollectorConfig,
        forget: Callable[[Sequence[PageKey]], None] = lambda _: None,
    ) -> None:
        """`forget` is told which pages were removed."""
        self._bucket = bucket
        self._names = names
        self._records = records
        self._config = config
        self._forget = forget
        self._pins = PinStore(bucket, records, names)

    def collect(self, step: Step, *, dry_run: bool = False) -> Collection:
        """Bring the bucket below its limits, or tell what that would take.

        The caller holds the lease, and renews it in each step.
        """
        removed, removed_bytes, over = 0, 0, False
        while True:
            found = self._look(step, dry_run=dry_run)
            over = over or found.bytes > (self._config.capacity or found.bytes)
            victims = found.victims(LOW_WATERMARK * self._config.capacity if over else None)
            if not dry_run:
                self._remove(victims, step)
            removed += len(victims)
            removed_bytes += sum(page.size for page in victims)
            pages, size = found.pages - len(victims), found.bytes - sum(p.size for p in victims)
            if dry_run or not found.goes_on(victims):
                break
        report = Report(
            pages=pages,
            bytes=size,
            removed_pages=removed,
            removed_bytes=removed_bytes,
            kept_pages=found.kept,
        )
        return Collection(report, not self._config.capacity or size <= self._config.capacity)

    def _look(self, step: Step, *, dry_run: bool) -> "_Found":
        now = self._records.clock(self._names.lease)
        period = self._config.use_period
        kept = self._kept(dry_run=dry_run)
        first = FirstToLeave(leaving_order(period, now), ROUND_LIMIT)
        age = self._config.max_age
        expired_before = (now - age) // period * period if age else 0.0
        pages, size, kept_pages, undated = 0, 0, 0, 0
        set_aside: list[str] = []
        for count, item in enumerate(self._bucket.objects(self._names.root), 1):
            if count % 1000 == 0:
                step("listed", count, None)
            key = self._names.page_key(item.name)
            if key is None:
                aside = item.name.startswith(self._names.quarantined)
                if (
                    aside
                    and is_plausible(item.modified)
                    and item.modified < now - QUARANTINE_SECONDS
                ):
                    set_aside.append(item.name)
                continue
            pages += 1
            size += item.size
            if not is_plausible(item.modified):
                undated += 1
            elif key in kept:
                kept_pages += 1
            else:
                first.offer(StoredPage(key, item.size, item.modified))
        if undated:
            log.warning(
                "pages kept whose LastModified cannot be right; the server's listing is at fault",
                extra={"fields": {"pages": undated}},
            )
        if not dry_run:
            self._bucket.remove(set_aside)
        return _Found(pages, size, kept_pages, first.take(), expired_before, first.overflowed)

    def _kept(self, *, dry_run: bool) -> frozenset[PageKey]:
        """Return the pinned pages; removes pins that have ended."""
        keys: set[PageKey] = set()
        for stored in self._pins.all():
            if stored.left > 0:
                keys.update(stored.pin.keys())
            elif not dry_run:
                self._pins.remove(stored.name)
        return frozenset(keys)

    def _remove(self, victims: Sequence[StoredPage], step: Step) -> None:
        done = 0
        with ThreadPoolExecutor(REMOVERS, thread_name_prefix="memkv-collect") as removers:
            for batch in _batches(victims, REMOVERS * REMOVED_AT_ONCE):
                step("removed", done, len(victims))
                list(removers.map(self._remove_some, _batches(batch, REMOVED_AT_ONCE)))
                done += len(batch)
        step("removed", done, len(victims))

    def _remove_some(self, pages: Sequence[StoredPage]) -> None:
        keys = [page.key for page in pages]
        self._bucket.remove(self._names.page(key) for key in keys)
        self._forget(keys)


def _batches(pages: Sequence[StoredPage], size: int) -> Iterator[Sequence[StoredPage]]:
    for first in range(0, len(pages), size):
        yield pages[first : first + size]


class _Found(NamedTuple):
    """What a listing told."""

    pages: int
    bytes: int
    kept: int
    """Pinned pages."""
    first: list[StoredPage]
    """To leave, in order; the first ones of all if there are many."""
    expired_before: float
    overflowed: bool

    def victims(self, target: float | None) -> list[StoredPage]:
        """Return what has to leave, in order, until no more than `target` bytes are left."""
        return list(self._until(0.0 if target is None else self.bytes - target))

    def _until(self, excess: float) -> Iterator[StoredPage]:
        for page in self.first:
            if excess <= 0 and page.modified >= self.expired_before:
                return
            excess -= page.size
            yield page

    def goes_on(self, victims: Sequence[StoredPage]) -> bool:
        """Tell whether more than this listing could hold has to leave."""
        return self.overflowed and len(victims) == len(self.first)
