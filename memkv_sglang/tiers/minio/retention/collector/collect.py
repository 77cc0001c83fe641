"""One collection: count what is there, remove what has to leave, in the order of `order`."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import NamedTuple, TypeVar

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.minio.admin import REMOVED_AT_ONCE, Bucket
from memkv_sglang.tiers.minio.http import (
    BackgroundCall,
    ProtocolError,
    ResponseHead,
    is_plausible,
    modified_time,
)
from memkv_sglang.tiers.minio.names import ObjectNames, is_ours
from memkv_sglang.tiers.minio.retention.collector.lease import RENEWALS, Report
from memkv_sglang.tiers.minio.retention.collector.order import (
    FirstToLeave,
    StoredPage,
    leaving_order,
)
from memkv_sglang.tiers.minio.retention.pins import PinStore
from memkv_sglang.tiers.minio.retention.records import Records

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LOW_WATERMARK = 0.95
"""Share of the capacity at which a collection ends."""

ROUND_LIMIT = 250_000
"""Pages that one listing may condemn, some 60 MB of memory; more of them take another listing."""

REMOVERS = 4
"""Requests at a time."""

REMOVE_SECONDS = 10.0
"""From a look at the pins to the end of the requests that rely on it, at most."""

QUARANTINE_SECONDS = 7 * 86400.0
"""How long a corrupt copy is kept for who wants to look at it."""

Step = Callable[[str, int, int | None], None]
"""Called between all steps with what is done, how much of it, of how many (None: not known).

May raise to end the collection there, or sleep to leave the processor to others.
"""


Hold = Callable[[], None]
"""Called right before pages are removed; raises unless the lease is still ours."""


class Collection(NamedTuple):
    """What was seen, and what left or, in a dry run, would leave."""

    report: Report
    satisfied: bool
    """False if pins hold more than the limits allow."""


class Collector:
    """Calls block, and raise `TierError` and what a step raises; pages removed by then are gone.

    Removes an object only if its name is a page's, it was stored as a page, it was not used since
    it was listed, and no pin keeps it just before.
    """

    def __init__(
        self,
        bucket: Bucket,
        records: Records,
        names: ObjectNames,
        config: CollectorConfig,
        forget: Callable[[Sequence[PageKey]], None] = lambda _: None,
        pins: PinStore | None = None,
    ) -> None:
        """`forget` is told which pages were removed. `pins` may know some of the pins already."""
        self._bucket = bucket
        self._names = names
        self._records = records
        self._config = config
        self._forget = forget
        self._pins = pins or PinStore(bucket, records, names)

    def collect(
        self, step: Step, *, hold: Hold = lambda: None, dry_run: bool = False
    ) -> Collection:
        """Bring the bucket below its limits, or tell what that would take.

        The caller holds the lease, and renews it in each step and in `hold`.
        """
        removed, removed_bytes, over = 0, 0, False
        foreign: set[PageKey] = set()
        while True:
            found = self._look(step, foreign, dry_run=dry_run)
            over = over or found.bytes > (self._config.capacity or found.bytes)
            target = LOW_WATERMARK * self._config.capacity if over else None
            if dry_run:
                gone = _Gone.of(found.victims(target))
            else:
                gone = self._remove(found, target, step, hold)
            removed += gone.pages
            removed_bytes += gone.bytes
            foreign |= gone.foreign
            pages = found.pages - gone.pages - gone.others
            size = found.bytes - gone.bytes - gone.other_bytes
            if dry_run or not found.overflowed or not gone.all or len(foreign) >= ROUND_LIMIT:
                break
        if foreign:
            fields = {"objects": len(foreign), "example": self._names.page(next(iter(foreign)))}
            log.warning("objects named like pages are none and stay", extra={"fields": fields})
        report = Report(
            pages=pages,
            bytes=size,
            removed_pages=removed,
            removed_bytes=removed_bytes,
            kept_pages=found.kept,
        )
        return Collection(report, not self._config.capacity or size <= self._config.capacity)

    def _look(self, step: Step, foreign: set[PageKey], *, dry_run: bool) -> "_Found":
        clock = _Clock(self._records.clock(self._names.lease))
        now, period = clock.now(), self._config.use_period
        pins = self._pins.look(now, lambda count: step("pins read", count, None))
        if not dry_run:
            self._bucket.remove(pins.ended)
        first = FirstToLeave(leaving_order(period, now), ROUND_LIMIT)
        age = self._config.max_age
        expired_before = (now - age) // period * period if age else 0.0
        pages, size, kept_pages, undated = 0, 0, 0, 0
        set_aside: list[str] = []
        listed = self._bucket.objects(self._names.root, self._names.past_foreign)
        for count, item in enumerate(listed, 1):
            if count % 1000 == 0:
                step("listed", count, None)
            key = self._names.page_key(item.name)
            if key is None:
                old = is_plausible(item.modified) and item.modified < now - QUARANTINE_SECONDS
                if old and self._names.is_quarantined(item.name) and len(set_aside) < ROUND_LIMIT:
                    set_aside.append(item.name)
                continue
            if key in foreign:
                continue
            pages += 1
            size += item.size
            if not is_plausible(item.modified):
                undated += 1
            elif key in pins.kept:
                kept_pages += 1
            else:
                first.offer(StoredPage(key, item.size, item.modified))
        if undated:
            log.warning(
                "pages kept whose LastModified cannot be right; the server's listing is at fault",
                extra={"fields": {"pages": undated}},
            )
        if not dry_run:
            for batch in _batches(set_aside, REMOVED_AT_ONCE):
                step("set aside before", len(batch), None)
                self._bucket.remove(batch)
        return _Found(
            pages, size, kept_pages, first.take(), expired_before, first.overflowed, clock
        )

    def _remove(self, found: "_Found", target: float | None, step: Step, hold: Hold) -> "_Gone":
        """Remove pages in order until no more than `target` bytes are left."""
        gone = _Gone()
        waiting = deque(found.first)
        wanted = len(found.victims(target))
        while batch := found.next_victims(waiting, target, gone):
            step("removed", gone.pages, wanted)
            # Not before the step, which may take long: a pin may have been made meanwhile.
            kept = self._pins.look(found.clock.now()).kept
            deadline = time.monotonic() + min(
                REMOVE_SECONDS, self._config.lease * (1 - 1 / RENEWALS)
            )
            hold()
            free = [page for page in batch if page.key not in kept]
            calls = [
                BackgroundCall(partial(self._remove_some, pages, deadline)).begin()
                for pages in _batches(free, REMOVED_AT_ONCE)
            ]
            wait(calls)
            for call in calls:
                gone.add(call.result())
        gone.all = not waiting
        step("removed", gone.pages, wanted)
        return gone

    def _remove_some(self, pages: Sequence[StoredPage], deadline: float) -> "_Gone":
        heads = self._records.heads([self._names.page(page.key) for page in pages], deadline)
        looked_at = list(zip(pages, heads, strict=True))
        gone = _Gone.of(page for page, head in looked_at if _may_leave(page, head))
        others = [page for page, head in looked_at if not is_ours(head)]
        gone.others, gone.other_bytes = len(others), sum(page.size for page in others)
        gone.foreign = {page.key for page, head in looked_at if _is_foreign(head)}
        left = deadline - time.monotonic()
        self._bucket.remove((self._names.page(key) for key in gone.keys), left)
        self._forget(gone.keys)
        return gone


def _may_leave(page: StoredPage, head: ResponseHead) -> bool:
    """Tell whether an object is a page that was not used since it was listed."""
    try:
        return is_ours(head) and modified_time(head) <= page.modified
    except ProtocolError:
        return False


def _is_foreign(head: ResponseHead) -> bool:
    return head.status == HTTPStatus.OK and not is_ours(head)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


class _Clock:
    """The server's time, from one answer on."""

    def __init__(self, now: float) -> None:
        self._ahead = now - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._ahead


class _Gone:
    """What was removed, and what was listed but turned out to be no page of ours (any more)."""

    def __init__(self) -> None:
        self.keys: list[PageKey] = []
        self.pages = 0
        self.bytes = 0
        self.others = 0
        """Objects that somebody else removed meanwhile, or that are foreign."""
        self.other_bytes = 0
        self.foreign: set[PageKey] = set()
        self.all = False
        """Whether everything that could leave was tried."""

    @classmethod
    def of(cls, pages: Iterable[StoredPage]) -> "_Gone":
        gone = cls()
        for page in pages:
            gone.keys.append(page.key)
            gone.bytes += page.size
        gone.pages = len(gone.keys)
        return gone

    def add(self, other: "_Gone") -> None:
        """Add up, without the keys, which nobody needs any more."""
        self.pages += other.pages
        self.bytes += other.bytes
        self.others += other.others
        self.other_bytes += other.other_bytes
        self.foreign |= other.foreign


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
    """Whether there are more than `first`."""
    clock: _Clock

    def victims(self, target: float | None) -> list[StoredPage]:
        """Return what has to leave, in order, until no more than `target` bytes are left."""
        return list(self._until(self.first, 0.0 if target is None else self.bytes - target))

    def next_victims(
        self, waiting: deque[StoredPage], target: float | None, gone: _Gone
    ) -> list[StoredPage]:
        """Take those that have to leave next, as many as are removed at a time."""
        left = self.bytes - gone.bytes - gone.other_bytes
        excess = 0.0 if target is None else left - target
        victims = self._until(waiting, excess)
        taken = list(islice(victims, REMOVERS * REMOVED_AT_ONCE))
        for _ in taken:
            waiting.popleft()
        return taken

    def _until(self, pages: Iterable[StoredPage], excess: float) -> Iterator[StoredPage]:
        for page in pages:
            if excess <= 0 and page.modified >= self.expired_before:
                return
            excess -= page.size
            yield page
