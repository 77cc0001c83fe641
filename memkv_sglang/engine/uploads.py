"""The upload queue: copy pages from this node's disk to the shared tier in the background."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memkv_sglang.engine.breaker import BreakerState, CircuitBreaker
from memkv_sglang.engine.gate import NamespaceGate
from memkv_sglang.engine.recent import RecentPages
from memkv_sglang.engine.staging import Staging
from memkv_sglang.log_limit import LogLimit
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    LoadResult,
    PendingPage,
    SpillResult,
    Tier,
    TierError,
    UploadMarks,
    loaded_pages,
)

log = logging.getLogger(__name__)

UPLOADERS = 2
"""Upload threads. One reads from the disk while the other waits for the shared tier."""

RUN_BYTES = 32 << 20
"""Maximum bytes of a run, which bounds the memory of an upload thread."""

BATCH_SECONDS = 5.0
"""Seconds to read a run, and again to store it."""

RETRY_SECONDS = 0.5
"""Seconds to wait after a run that was not stored completely, and while the circuit is open."""

LOG_INTERVAL = 10.0
"""Seconds between log lines about drops for the same reason: a full queue drops at every spill."""

UNREADABLE = (LoadResult.MISSING, LoadResult.CORRUPT)
"""The disk no longer has a valid copy, so there is nothing to upload."""

MAX_DROPPED = 100_000
"""Dropped pages to remember, so that none of their descendants is uploaded."""

MAX_UPLOADED = 200_000
"""Uploaded pages to remember, so that spilling them again costs nothing."""


@dataclass(slots=True)
class _Run:
    """Consecutive pages of a chain, or unrelated pages found after a restart."""

    pages: list[PendingPage]
    chained: bool
    attempts: int = 0
    is_full: bool = False
    """Whether the shared tier was full at the last attempt."""

    @property
    def namespace(self) -> bytes:
        """The namespace of all pages."""
        return self.pages[0].key.namespace


class UploadQueue:
    """Uploads pages from `local` to `shared` in the background, in the order of their spill.

    Waiting pages are recorded in `marks`, so the queue survives a crash. Thread-safe.
    """

    def __init__(
        self,
        local: Tier,
        shared: Tier,
        marks: UploadMarks,
        breaker: CircuitBreaker,
        metrics: Metrics,
        gate: NamespaceGate,
        *,
        backlog: int,
        attempts: int,
    ) -> None:
        """Resume the queue of an earlier process. `backlog` is the limit in bytes."""
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
        found = list(marks.pending())
        self._count(len(found), _bytes(found))
        self._enqueue(_split(found, chained=False))
        self._threads = [
            threading.Thread(target=self._upload_all, name=f"memkv-upload-{i}", daemon=True)
            for i in range(UPLOADERS)
        ]
        for thread in self._threads:
            thread.start()

    def forget(self, namespace: bytes) -> None:
        """Cancel the uploads of a namespace that is being cleared, and forget earlier ones."""
        with self._changed:
            runs, self._runs = self._runs, deque()
            for run in runs:
                if run.namespace == namespace:
                    self._settle(run, [])
                else:
                    self._runs.append(run)
            self._uploaded.discard(namespace)
            self._dropped.discard(namespace)

    @property
    def pages(self) -> int:
        """Pages waiting or being uploaded."""
        return self._pages

    @property
    def bytes(self) -> int:
        """Bytes waiting or being uploaded."""
        return self._bytes

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
            fresh: those that this spill has just written. The disk did not have them, so the shared
                tier may have lost them too: earlier upload records of them are stale.

        Over the backlog limit, the pages stay on this node, and so do their descendants: a chain
        with a hole in the shared tier could not be loaded.

        Returns how many pages are still stored, counted from the first. A page can be evicted
        before it is marked if the disk is full of marked pages.

        """
        with self._changed:
            stored = list(fresh)
            for key in stored:
                self._uploaded.remove(key)
            unmarked = [key for key in stored if key in self._waiting]
        if unmarked:  # the mark was lost with the evicted copy; the queued run uploads the new one
            self._marks.mark_pending(unmarked)
        with self._changed:
            unsettled = [page for page in pages if not self._is_settled(page.key)]
            if not unsettled:
                return len(pages)
            before = [parent, *(page.key for page in pages)][pages.index(unsettled[0])]
            is_orphan = before is not None and before in self._dropped
            size = _bytes(unsettled)
            if is_orphan or self._bytes + size > self._backlog:
                self._drop(unsettled, "backlog")
                return len(pages)
            self._count(len(unsettled), size)  # now: calls may be concurrent
        marked = self._marks.mark_pending([page.key for page in unsettled])
        self._enqueue(_split(unsettled[:marked], chained=True))
        if marked == len(unsettled):
            return len(pages)
        evicted = unsettled[marked:]
        with self._changed:
            self._count(-len(evicted), -_bytes(evicted))
            self._changed.notify_all()
        return pages.index(evicted[0])

    def lacks(self, key: PageKey) -> bool:
        """Return whether a page is known to be missing from the shared tier: waiting or dropped."""
        with self._changed:
            return key in self._waiting or key in self._dropped

    def _is_settled(self, key: PageKey) -> bool:
        return key in self._waiting or key in self._uploaded

    def _drop(self, pages: Sequence[PendingPage], reason: str) -> None:
        self._dropped.add(page.key for page in pages)
        self._metrics.upload_dropped_pages.labels(reason).inc(len(pages))
        self._unreported[reason] += len(pages)
        if self._limit.admit(reason) is not None:
            fields = {"pages": self._unreported.pop(reason), "reason": reason}
            log.warning("uploads dropped", extra={"fields": fields})

    def _enqueue(self, runs: Iterable[_Run]) -> None:
        """Pass runs, whose pages are already counted, to the upload threads."""
        with self._changed:
            for run in runs:
                self._runs.append(run)
                self._waiting.update(page.key for page in run.pages)
            self._changed.notify_all()

    def _count(self, pages: int, size: int) -> None:
        self._pages += pages
        self._bytes += size
        self._metrics.upload_queue_pages.set(self._pages)
        self._metrics.upload_queue_bytes.set(self._bytes)

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty. False after `timeout` seconds or on `close`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pages or self._closing.is_set(), timeout)
            return self._pages == 0

    def close(self, drain: float) -> None:
        """Upload for at most `drain` seconds, then stop. Remaining pages stay marked."""
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
        """Upload. Counts a failed attempt if the tier is up and not full, but stored nothing."""
        try:
            left = self._upload(run, staging)
        except TierError:
            return run.pages
        except Exception:  # a bug, but the thread must go on
            log.exception("upload failed", extra={"fields": {"pages": len(run.pages)}})
            left = run.pages
        refused = len(left) == len(run.pages) and self._breaker.state is BreakerState.CLOSED
        run.attempts += refused and not run.is_full
        return left

    def _settle(self, run: _Run, left: list[PendingPage]) -> None:
        """Remove finished pages from the queue's counts, and requeue the rest at the front."""
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
            self._uploaded.add(uploaded)
        return left

    def _lacking(self, run: _Run) -> list[PendingPage]:
        """Return the pages that the shared tier does not hold.

        A lookup may skip pages within a chain and use cached presence. Pages wrongly taken for
        uploaded would never be retried, so this checks each page of the found prefix.
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


def _split(pages: Iterable[PendingPage], *, chained: bool) -> list[_Run]:
    """Split pages into runs of one namespace and at most `RUN_BYTES`, but at least one page."""
    runs: list[_Run] = []
    space, namespace = 0, b""
    for page in pages:
        if not runs or page.length > space or page.key.namespace != namespace:
            runs.append(_Run([], chained))
            space, namespace = RUN_BYTES, page.key.namespace
        runs[-1].pages.append(page)
        space -= page.length
    return runs
