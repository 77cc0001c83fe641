"""The upload queue: copy pages from this node's disk to the shared tier in the background.

`engine.upload` decides when. Every rule uploads the pages of a chain in order, so that a chain in
the shared tier has no holes.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from memkv_sglang.engine.breaker import Breaker, BreakerState
from memkv_sglang.engine.gate import NamespaceGate
from memkv_sglang.engine.recent import RecentPages
from memkv_sglang.engine.staging import Staging
from memkv_sglang.log_limit import LogLimit
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    LoadResult,
    PendingPage,
    PendingUploads,
    SpillResult,
    Tier,
    TierError,
    loaded_pages,
)

log = logging.getLogger(__name__)

UploadRule = Literal["always", "second_use", "before_eviction"]

UPLOADERS = 2
"""Upload threads. One reads from the disk while the other waits for the shared tier."""

RUN_BYTES = 32 << 20
"""Maximum bytes of a run, which limits the memory of an upload thread."""

BATCH_SECONDS = 5.0
"""Seconds to read a run from the disk, and again to store it in the shared tier."""

RETRY_SECONDS = 0.5
"""Seconds to wait after a run that was not stored completely, and while the circuit is open."""

LOG_INTERVAL = 10.0
"""Seconds between log lines about drops for the same reason. A full queue drops pages at every
spill."""

UNREADABLE = (LoadResult.MISSING, LoadResult.CORRUPT)
"""Results that mean that the disk no longer has a valid copy, so there is nothing to upload."""

MAX_DROPPED = 100_000
"""Number of dropped pages to remember, so that none of their descendants is uploaded."""

MAX_UPLOADED = 200_000
"""Number of pages to remember that need no upload, so that using them again costs nothing."""

DEFERRED_SHARE = 0.5
"""Share of the disk that deferred pages may take. The rest can be evicted at any time."""


@dataclass(slots=True)
class _Run:
    """Consecutive pages of a chain, or unrelated pages found after a restart."""

    pages: list[PendingPage]
    chained: bool
    attempts: int = 0
    queued: float = 0.0
    """When the run was queued (`time.monotonic`)."""
    is_full: bool = False
    """Whether the shared tier was full at the last attempt."""

    @property
    def namespace(self) -> bytes:
        """The namespace of all pages in the run."""
        return self.pages[0].key.namespace


class UploadQueue:
    """Uploads pages from `local` to `shared` in the background, in the order of their spill.

    Waiting pages are recorded in `marks`, so the queue survives a crash. With the rule
    `before_eviction`, pages are first deferred: they are marked, and queued once the deferred pages
    take more than `DEFERRED_SHARE` of the disk. Thread-safe.
    """

    def __init__(
        self,
        local: Tier,
        shared: Tier,
        marks: PendingUploads,
        breaker: Breaker,
        metrics: Metrics,
        gate: NamespaceGate,
        *,
        backlog: int,
        attempts: int,
        rule: UploadRule = "always",
    ) -> None:
        """Resume the queue of an earlier process. The queue holds at most `backlog` bytes."""
        self._rule = rule
        self._deferred: deque[_Run] = deque()
        self._deferred_bytes = 0
        self._local = local
        self._shared = shared
        self._marks = marks
        self._breaker = breaker
        self._metrics = metrics
        self._gate = gate
        self._backlog = backlog
        metrics.upload_queue_capacity_bytes.set(backlog)
        self._attempts = attempts
        self._changed = threading.Condition()
        self._runs: deque[_Run] = deque()
        self._pages = 0
        self._bytes = 0
        self._dropped = RecentPages(MAX_DROPPED)
        self._unreported: Counter[str] = Counter()
        self._limit = LogLimit(LOG_INTERVAL)
        self._uploaded = RecentPages(MAX_UPLOADED)
        self._waiting: set[PageKey] = set()
        self._closing = threading.Event()
        self._enqueue(_split(marks.pending(), chained=False))
        self._threads = [
            threading.Thread(target=self._upload_all, name=f"memkv-upload-{i}", daemon=True)
            for i in range(UPLOADERS)
        ]
        for thread in self._threads:
            thread.start()

    def resume(self, pages: Sequence[PendingPage]) -> None:
        """Queue pages that were marked earlier, when their disk was broken."""
        with self._changed:
            new = [page for page in pages if page.key not in self._waiting]
            self._enqueue(_split(new, chained=False))

    def forget(self, namespace: bytes) -> None:
        """Cancel the uploads of a namespace that is being cleared, and forget earlier uploads."""
        with self._changed:
            runs, self._runs = self._runs, deque()
            for run in runs:
                if run.namespace == namespace:
                    self._settle(run, [])
                else:
                    self._runs.append(run)
            for run in [run for run in self._deferred if run.namespace == namespace]:
                self._deferred.remove(run)
                self._deferred_bytes -= _bytes(run.pages)
                self._waiting.difference_update(_page_keys(run.pages))
            self._uploaded.discard(namespace)
            self._dropped.discard(namespace)

    @property
    def pages(self) -> int:
        """Number of pages that are waiting or being uploaded."""
        return self._pages

    @property
    def bytes(self) -> int:
        """Number of bytes that are waiting or being uploaded."""
        return self._bytes

    @property
    def age(self) -> float:
        """Seconds that the oldest pages in the queue have waited; 0 if the queue is empty."""
        with self._changed:
            return time.monotonic() - self._runs[0].queued if self._runs else 0.0

    def offer(
        self,
        pages: Sequence[PendingPage],
        parent: PageKey | None,
        fresh: Iterable[PageKey] = (),
    ) -> int:
        """Queue stored pages of a chain, and mark them durably. Blocks only for the journal.

        Args:
            pages: the pages, in order.
            parent: the page before the first, if any.
            fresh: the pages that this spill has just written. The disk did not have them, so the
                shared tier may have lost them too: earlier upload records of them are stale.

        If the queue would exceed its limit, the pages are not queued, and neither are their
        descendants: the shared tier could not load a page without its ancestors.

        With the rule `second_use`, fresh pages are not queued; see `use`.

        Returns how many pages are still stored, counted from the first. A page can be evicted
        before it is marked if the disk is full of marked pages.

        """
        stored = list(fresh)
        with self._changed:
            for key in stored:
                self._uploaded.remove(key)
            unmarked = [key for key in stored if key in self._waiting]
        # The marks were lost with the evicted copies. The queued run uploads the new copies.
        if unmarked:
            self._marks.mark_pending(unmarked)
        if self._rule == "second_use":
            used = _before_first(pages, set(stored))
            self._queue(used, parent)  # a page that was evicted meanwhile is just not uploaded
            return len(pages)
        return self._queue(pages, parent)

    @property
    def tracks_use(self) -> bool:
        """Whether `use` does anything."""
        return self._rule == "second_use"

    def use(self, keys: Sequence[PageKey], length: int) -> None:
        """Queue pages of a chain, root first, that are used again; each has `length` bytes.

        Needed for the rule `second_use`. Queues only pages on this disk.
        """
        with self._changed:
            settled = next((i for i in reversed(range(len(keys))) if self._is_settled(keys[i])), -1)
        parent = keys[settled] if settled >= 0 else None
        keys = keys[settled + 1 :]
        if not keys:
            return
        held = self._local.present(keys, time.monotonic() + BATCH_SECONDS)
        with self._changed:
            self._remember([key for key, here in zip(keys, held, strict=True) if not here])
        ours = [PendingPage(key, length) for key, here in zip(keys, held, strict=True) if here]
        if ours:
            first = keys.index(ours[0].key)
            self._queue(ours, keys[first - 1] if first else parent)

    def release(self) -> None:
        """Upload all deferred pages now, because the disk needs their space."""
        with self._changed:
            self._release(0)

    def _queue(self, pages: Sequence[PendingPage], parent: PageKey | None) -> int:
        """Queue and mark the pages that are not waiting or uploaded yet; return as `offer` does."""
        with self._changed:
            unsettled = [page for page in pages if not self._is_settled(page.key)]
            if not unsettled:
                return len(pages)
            before = [parent, *(page.key for page in pages)][pages.index(unsettled[0])]
            is_orphan = before is not None and before in self._dropped
            size = _bytes(unsettled)
            if is_orphan or (self._is_limited and self._bytes + size > self._backlog):
                self._drop(unsettled, "backlog")
                return len(pages)
            # count them now, because other calls may queue pages at the same time
            self._count(len(unsettled), size)
        marked = self._marks.mark_pending([page.key for page in unsettled])
        with self._changed:
            self._count(-len(unsettled), -size)
            self._enqueue(_split(unsettled[:marked], chained=True))
        return len(pages) if marked == len(unsettled) else pages.index(unsettled[marked])

    @property
    def _is_limited(self) -> bool:
        """Whether the backlog limit applies. Deferred pages have a limit of their own."""
        return self._rule != "before_eviction"

    def lacks(self, key: PageKey) -> bool:
        """Return whether the shared tier is known to lack a page: it is waiting or was dropped."""
        with self._changed:
            return key in self._waiting or key in self._dropped

    def _is_settled(self, key: PageKey) -> bool:
        return key in self._waiting or key in self._uploaded

    def _remember(self, keys: Sequence[PageKey]) -> None:
        """Remember that the shared tier has these pages, dropped before or not."""
        self._uploaded.add(keys)
        for key in keys:
            self._dropped.remove(key)

    def _drop(self, pages: Sequence[PendingPage], reason: str) -> None:
        self._dropped.add(page.key for page in pages)
        self._metrics.upload_dropped_pages.labels(reason).inc(len(pages))
        self._unreported[reason] += len(pages)
        if self._limit.admit(reason) is not None:
            fields = {"pages": self._unreported.pop(reason), "reason": reason}
            log.warning("uploads dropped", extra={"fields": fields})

    def _enqueue(self, runs: Iterable[_Run]) -> None:
        """Pass runs to the upload threads, or defer them."""
        with self._changed:
            for run in runs:
                self._waiting.update(page.key for page in run.pages)
                self._deferred.append(run)
                self._deferred_bytes += _bytes(run.pages)
            self._release(self._deferrable())

    def _deferrable(self) -> float:
        """Return how many bytes may be deferred."""
        if self._rule != "before_eviction":
            return 0
        usage = self._local.usage()
        if usage.capacity is None:
            return math.inf
        return 0 if usage.bytes > usage.capacity else DEFERRED_SHARE * usage.capacity

    def _release(self, limit: float) -> None:
        """Queue the oldest deferred runs until at most `limit` bytes remain deferred."""
        while self._deferred and self._deferred_bytes > limit:
            run = self._deferred.popleft()
            size = _bytes(run.pages)
            self._deferred_bytes -= size
            self._count(len(run.pages), size)
            run.queued = time.monotonic()
            self._runs.append(run)
        self._metrics.upload_deferred_bytes.set(self._deferred_bytes)
        self._changed.notify_all()

    def _count(self, pages: int, size: int) -> None:
        self._pages += pages
        self._bytes += size
        self._metrics.upload_queue_pages.set(self._pages)
        self._metrics.upload_queue_bytes.set(self._bytes)

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty. Returns False after `timeout` seconds or on `close`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pages or self._closing.is_set(), timeout)
            return self._pages == 0

    def close(self, drain: float) -> None:
        """Upload for at most `drain` seconds, then stop. The remaining pages stay marked."""
        self.flush(drain)
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _upload_all(self) -> None:
        with Staging(RUN_BYTES) as staging:
            while (run := self._next()) is not None:
                with self._gate.enter(run.namespace) as is_open:
                    left = self._try(run, staging) if is_open else []
                    if left and run.attempts >= self._attempts:
                        self._give_up(left)
                        left = []
                    self._settle(run, left)
                if left:
                    self._closing.wait(RETRY_SECONDS)

    def _next(self) -> _Run | None:
        while self._breaker.state is BreakerState.OPEN and not self._closing.is_set():
            self._closing.wait(RETRY_SECONDS)
        with self._changed:
            self._changed.wait_for(lambda: self._runs or self._closing.is_set())
            return None if self._closing.is_set() else self._runs.popleft()

    def _try(self, run: _Run, staging: Staging) -> list[PendingPage]:
        """Upload a run; return the pages to retry.

        Counts a failed attempt if the shared tier is up and not full, but stored nothing.
        """
        try:
            left = self._upload(run, staging)
        except TierError:
            return run.pages
        except Exception:  # This is a bug, but the thread must keep running.
            log.exception("upload failed", extra={"fields": {"pages": len(run.pages)}})
            left = run.pages
        refused = len(left) == len(run.pages) and self._breaker.state is BreakerState.CLOSED
        run.attempts += refused and not run.is_full
        return left

    def _settle(self, run: _Run, left: list[PendingPage]) -> None:
        """Subtract finished pages from the queue's counts, and put the rest back at its front."""
        with self._changed:
            self._count(len(left) - len(run.pages), _bytes(left) - _bytes(run.pages))
            self._waiting.difference_update(
                {page.key for page in run.pages} - set(_page_keys(left))
            )
            if left:
                run.pages = left
                self._runs.appendleft(run)
            self._changed.notify_all()

    def _give_up(self, pages: list[PendingPage]) -> None:
        self._marks.mark_uploaded([page.key for page in pages])
        with self._changed:
            self._drop(pages, "failed")

    def _upload(self, run: _Run, staging: Staging) -> list[PendingPage]:
        """Upload the pages that the shared tier lacks; return those to retry.

        Raises `TierError` if the shared tier cannot be reached.
        """
        lacking = self._lacking(run)
        pages = staging.pages(lacking)
        outcomes = self._local.fetch(pages, time.monotonic() + BATCH_SECONDS)
        readable = loaded_pages(pages, outcomes)
        stored = self._shared.spill(readable, time.monotonic() + BATCH_SECONDS)
        run.is_full = SpillResult.REFUSED in stored
        done = _keys(readable, [result <= SpillResult.PRESENT for result in stored])
        unreadable = _keys(pages, [fetched.result in UNREADABLE for fetched in outcomes])
        self._metrics.upload_dropped_pages.labels("evicted").inc(len(unreadable))
        left = [page for page in lacking if page.key not in done | unreadable]
        retried = set(_page_keys(left))
        finished = [page.key for page in run.pages if page.key not in retried]
        uploaded = [key for key in finished if key not in unreadable]
        self._marks.mark_uploaded(uploaded)
        with self._changed:
            self._remember(uploaded)
        return left

    def _lacking(self, run: _Run) -> list[PendingPage]:
        """Return the pages that the shared tier does not hold.

        A lookup does not check every page of the prefix and may use cached presence. A page that is
        wrongly taken for uploaded would never be retried, so this checks each page of the prefix.
        """
        deadline = time.monotonic() + BATCH_SECONDS
        keys = [page.key for page in run.pages]
        if run.chained:
            chain = Chain(keys[0].namespace, [key.hash for key in keys])
            keys = keys[: self._shared.lookup(chain, deadline).length]
        self._shared.invalidate(keys)
        present = self._shared.present(keys, deadline) if keys else []
        absent = [page for page, found in zip(run.pages, present, strict=False) if not found]
        return absent + run.pages[len(keys) :]


def _bytes(pages: Iterable[PendingPage]) -> int:
    return sum(page.length for page in pages)


def _page_keys(pages: Sequence[PendingPage]) -> list[PageKey]:
    return [page.key for page in pages]


def _keys(pages: Sequence[Page], chosen: Sequence[bool]) -> set[PageKey]:
    return {page.key for page, is_chosen in zip(pages, chosen, strict=True) if is_chosen}


def _before_first(pages: Sequence[PendingPage], keys: set[PageKey]) -> Sequence[PendingPage]:
    """Return the pages before the first whose key is among `keys`."""
    count = next((i for i, page in enumerate(pages) if page.key in keys), len(pages))
    return pages[:count]


def _split(pages: Iterable[PendingPage], *, chained: bool) -> list[_Run]:
    """Split pages into runs of one namespace each, of at most `RUN_BYTES` or a single page."""
    runs: list[_Run] = []
    space, namespace = 0, b""
    for page in pages:
        if not runs or page.length > space or page.key.namespace != namespace:
            runs.append(_Run([], chained))
            space, namespace = RUN_BYTES, page.key.namespace
        runs[-1].pages.append(page)
        space -= page.length
    return runs
