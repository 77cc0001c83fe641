"""One collection: lists the bucket, and removes pages beyond the limits in the order of `order`."""

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
    EvictionQueue,
    StoredPage,
    eviction_order,
)
from memkv_sglang.tiers.minio.retention.pins import PinStore
from memkv_sglang.tiers.minio.retention.records import Records

log = logging.getLogger(__name__)

Item = TypeVar("Item")

LOW_WATERMARK = 0.95
"""Share of the capacity down to which a collection removes pages."""

ROUND_LIMIT = 250_000
"""Maximum number of pages to remove per listing (about 60 MB); more need another listing."""

REMOVERS = 4
"""Number of concurrent delete requests."""

REMOVE_SECONDS = 10.0
"""Maximum time, in seconds, from reading the pins to the last delete that relies on them."""

QUARANTINE_SECONDS = 7 * 86400.0
"""How long quarantined objects are kept for inspection, in seconds."""

Step = Callable[[str, int, int | None], None]
"""Called after each step with the activity, the progress and the total (None if unknown).

May raise to end the collection, or sleep to slow it down.
"""


Hold = Callable[[], None]
"""Called just before pages are removed; raises if this node has lost the lease."""


class Collection(NamedTuple):
    """The result of a collection or a dry run."""

    report: Report
    satisfied: bool
    """False if pinned pages exceed the limits."""


class Collector:
    """Collects a bucket. Calls block, and raise `TierError` and what a step raises.

    Removes an object only if it has the name and the metadata of a page, was not used since it was
    listed, and is not pinned.
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
        """`forget` is called with the removed pages. `pins` may have cached pins."""
        self._bucket = bucket
        self._names = names
        self._records = records
        self._config = config
        self._forget = forget
        self._pins = pins or PinStore(bucket, records, names)

    def collect(
        self, step: Step, *, hold: Hold = lambda: None, dry_run: bool = False
    ) -> Collection:
        """Bring the bucket below its limits, or report what that would remove.

        The caller must hold the lease, and renew it in each step and in `hold`.
        """
        removed, removed_bytes, over = 0, 0, False
        foreign: set[PageKey] = set()
        while True:
            found = self._look(step, foreign, dry_run=dry_run)
            over = over or found.bytes > (self._config.capacity or found.bytes)
            target = LOW_WATERMARK * self._config.capacity if over else None
            if dry_run:
                outcome = _Removed.of(found.victims(target))
            else:
                outcome = self._remove(found, target, step, hold)
            removed += outcome.pages
            removed_bytes += outcome.bytes
            foreign |= outcome.foreign
            pages = found.pages - outcome.pages - outcome.others
            size = found.bytes - outcome.bytes - outcome.other_bytes
            if dry_run or not found.overflowed or not outcome.all or len(foreign) >= ROUND_LIMIT:
                break
        if foreign:
            fields = {"objects": len(foreign), "example": self._names.page(next(iter(foreign)))}
            log.warning("objects with page names are not pages and stay", extra={"fields": fields})
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
        first = EvictionQueue(eviction_order(period, now), ROUND_LIMIT)
        age = self._config.max_age
        expired_before = (now - age) // period * period if age else 0.0
        pages, size, kept_pages, undated = 0, 0, 0, 0
        quarantined: list[str] = []
        listed = self._bucket.objects(self._names.root, self._names.past_foreign)
        for count, item in enumerate(listed, 1):
            if count % 1000 == 0:
                step("listed", count, None)
            key = self._names.page_key(item.name)
            if key is None:
                old = is_plausible(item.modified) and item.modified < now - QUARANTINE_SECONDS
                if old and self._names.is_quarantined(item.name) and len(quarantined) < ROUND_LIMIT:
                    quarantined.append(item.name)
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
                "pages kept because their LastModified is implausible; check the server's listing",
                extra={"fields": {"pages": undated}},
            )
        if not dry_run:
            for batch in _batches(quarantined, REMOVED_AT_ONCE):
                step("quarantine", len(batch), None)
                self._bucket.remove(batch)
        return _Found(
            pages, size, kept_pages, first.take(), expired_before, first.overflowed, clock
        )

    def _remove(self, found: "_Found", target: float | None, step: Step, hold: Hold) -> "_Removed":
        """Remove pages in order until at most `target` bytes are left."""
        outcome = _Removed()
        waiting = deque(found.first)
        wanted = len(found.victims(target))
        while batch := found.next_victims(waiting, target, outcome):
            step("removed", outcome.pages, wanted)
            # After the step, which may take long: pages may have been pinned meanwhile.
            kept = self._pins.look(found.clock.now()).kept
            deadline = time.monotonic() + min(
                REMOVE_SECONDS, self._config.lease_ttl * (1 - 1 / RENEWALS)
            )
            hold()
            free = [page for page in batch if page.key not in kept]
            calls = [
                BackgroundCall(partial(self._remove_some, pages, deadline)).begin()
                for pages in _batches(free, REMOVED_AT_ONCE)
            ]
            wait(calls)
            for call in calls:
                outcome.add(call.result())
        outcome.all = not waiting
        step("removed", outcome.pages, wanted)
        return outcome

    def _remove_some(self, pages: Sequence[StoredPage], deadline: float) -> "_Removed":
        heads = self._records.heads([self._names.page(page.key) for page in pages], deadline)
        looked_at = list(zip(pages, heads, strict=True))
        outcome = _Removed.of(page for page, head in looked_at if _may_leave(page, head))
        others = [page for page, head in looked_at if not is_ours(head)]
        outcome.others, outcome.other_bytes = len(others), sum(page.size for page in others)
        outcome.foreign = {page.key for page, head in looked_at if _is_foreign(head)}
        left = deadline - time.monotonic()
        self._bucket.remove((self._names.page(key) for key in outcome.keys), left)
        self._forget(outcome.keys)
        return outcome


def _may_leave(page: StoredPage, head: ResponseHead) -> bool:
    """Return whether an object is a page that was not used since it was listed."""
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
    """The server's time, extrapolated from one response."""

    def __init__(self, now: float) -> None:
        self._ahead = now - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._ahead


class _Removed:
    """Counts of removed pages, and of listed objects that are not, or no longer, pages."""

    def __init__(self) -> None:
        self.keys: list[PageKey] = []
        self.pages = 0
        self.bytes = 0
        self.others = 0
        """Objects that were removed by others meanwhile, or that are foreign."""
        self.other_bytes = 0
        self.foreign: set[PageKey] = set()
        self.all = False
        """Whether all candidates were tried."""

    @classmethod
    def of(cls, pages: Iterable[StoredPage]) -> "_Removed":
        outcome = cls()
        for page in pages:
            outcome.keys.append(page.key)
            outcome.bytes += page.size
        outcome.pages = len(outcome.keys)
        return outcome

    def add(self, other: "_Removed") -> None:
        """Add the counts; the keys are not needed any more."""
        self.pages += other.pages
        self.bytes += other.bytes
        self.others += other.others
        self.other_bytes += other.other_bytes
        self.foreign |= other.foreign


class _Found(NamedTuple):
    """The result of a listing."""

    pages: int
    bytes: int
    kept: int
    """Pinned pages."""
    first: list[StoredPage]
    """Candidates for removal, in order; `ROUND_LIMIT` at most."""
    expired_before: float
    overflowed: bool
    """Whether there are more candidates."""
    clock: _Clock

    def victims(self, target: float | None) -> list[StoredPage]:
        """Return the pages to remove, in order, until at most `target` bytes are left."""
        return list(self._until(self.first, 0.0 if target is None else self.bytes - target))

    def next_victims(
        self, waiting: deque[StoredPage], target: float | None, outcome: _Removed
    ) -> list[StoredPage]:
        """Take the next pages to remove from `waiting`, at most one round of requests."""
        left = self.bytes - outcome.bytes - outcome.other_bytes
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
