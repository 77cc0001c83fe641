"""The upload queue: pages on this node's disk that wait for their copy in the shared tier."""

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
    PendingUploads,
    SpillResult,
    Tier,
    TierError,
    loaded_pages,
)

log = logging.getLogger(__name__)

UPLOADERS = 2
"""Threads that upload runs: one reads from the disk while the other waits for the shared tier."""

RUN_BYTES = 32 << 20
"""Most that an uploader takes on at once; bounds its memory."""

BATCH_SECONDS = 5.0
"""Longest time for one run to be read, and again for it to be stored."""

RETRY_SECONDS = 0.5
"""Pause after a run that could not be stored whole, and while the circuit is open."""

QUIET_SECONDS = 10.0
"""Time between two log lines about drops for one reason: a full queue drops at every spill."""

GONE = (LoadResult.MISSING, LoadResult.CORRUPT)
"""The disk has no right copy any more: there is nothing to upload."""

REMEMBERED_DROPS = 100_000
"""Pages that a full queue did not take, remembered so that none is uploaded behind them."""

REMEMBERED_UPLOADS = 200_000
"""Pages known to be in the shared tier, remembered so that a second spill costs nothing."""


@dataclass(slots=True)
class _Run:
    """Pages that follow one another in a chain, or stray pages found after a restart."""

    pages: list[PendingPage]
    chained: bool
    attempts: int = 0
    is_full: bool = False
    """Whether the shared tier said, the last time, that it takes no pages at all."""

    @property
    def namespace(self) -> bytes:
        """The namespace of all of its pages."""
        return self.pages[0].key.namespace


class UploadQueue:
    """Moves pages from `local` to `shared` behind the caller's back, in the order of their spill.

    What waits is marked in `marks` and so survives a kill of the process. Thread-safe.
    """

    def __init__(
        self,
        local: Tier,
        shared: Tier,
        marks: PendingUploads,
        breaker: CircuitBreaker,
        metrics: Metrics,
        gate: NamespaceGate,
        *,
        backlog: int,
        attempts: int,
    ) -> None:
        """Start with what an earlier process left waiting. `backlog` is in bytes."""
        self._local = local
        self._shared = shared
        self._marks = marks
        self._breaker = breaker
        self._metrics = metrics
        self._gate = gate
        self._backlog = backlog
        self._attempts = attempts
        self._changed = threading.Condition()
        self._runs: deque[_Run] = deque()
        self._pages = 0
        self._bytes = 0
        self._dropped = RecentPages(REMEMBERED_DROPS)
        self._unreported: Counter[str] = Counter()
        self._limit = LogLimit(QUIET_SECONDS)
        self._uploaded = RecentPages(REMEMBERED_UPLOADS)
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
        """Cancel the runs of a namespace that is being cleared, and start over with its pages."""
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
        """Pages that wait or are on their way."""
        return self._pages

    @property
    def bytes(self) -> int:
        """Bytes that wait or are on their way."""
        return self._bytes

    def offer(
        self,
        pages: Sequence[PendingPage],
        parent: PageKey | None,
        fresh: Iterable[PageKey] = (),
    ) -> int:
        """Queue pages of a chain, `parent` being the page before the first; marks them durably.

        Returns how many of them, from the first on, are still there: on a disk full of pages that
        wait, those that do not yet can leave for others.

        Those that are `fresh` on this node's disk were missed, perhaps in the shared tier as well
        by now: what is remembered of their upload holds no more.
        Over the backlog limit the pages stay on this node alone, and so do those that later come
        to follow them: the shared tier would hold a chain with a hole, which nobody could load.
        Blocks for the journal only.
        """
        with self._changed:
            stored = list(fresh)
            for key in stored:
                self._uploaded.remove(key)
            unmarked = [key for key in stored if key in self._waiting]
        if unmarked:  # with the copy that had the mark; the run that waits finds the new one
            self._marks.mark_pending(unmarked)
        with self._changed:
            unsettled = [page for page in pages if not self._is_settled(page.key)]
            if not unsettled:
                return len(pages)
            before = [parent, *(page.key for page in pages)][pages.index(unsettled[0])]
            orphaned = before is not None and before in self._dropped
            size = _bytes(unsettled)
            if orphaned or self._bytes + size > self._backlog:
                self._drop(unsettled, "backlog")
                return len(pages)
            self._count(len(unsettled), size)  # now, lest calls at once pass the limit together
        marked = self._marks.mark_pending([page.key for page in unsettled])
        self._enqueue(_split(unsettled[:marked], chained=True))
        if marked == len(unsettled):
            return len(pages)
        gone = unsettled[marked:]
        with self._changed:
            self._count(-len(gone), -_bytes(gone))
            self._changed.notify_all()
        return pages.index(gone[0])

    def lacks(self, key: PageKey) -> bool:
        """Tell whether the shared tier lacks a page that waits for upload or was dropped."""
        with self._changed:
            return key in self._waiting or key in self._dropped

    def _is_settled(self, key: PageKey) -> bool:
        return key in self._waiting or key in self._uploaded

    def _drop(self, pages: Sequence[PendingPage], reason: str) -> None:
        self._dropped.add(page.key for page in pages)
        self._metrics.uploads_dropped.labels(reason).inc(len(pages))
        self._unreported[reason] += len(pages)
        if self._limit.admit(reason) is not None:
            fields = {"pages": self._unreported.pop(reason), "reason": reason}
            log.warning("uploads dropped", extra={"fields": fields})

    def _enqueue(self, runs: Iterable[_Run]) -> None:
        """Let the uploaders have pages that are counted already."""
        with self._changed:
            for run in runs:
                self._runs.append(run)
                self._waiting.update(page.key for page in run.pages)
            self._changed.notify_all()

    def _count(self, pages: int, size: int) -> None:
        self._pages += pages
        self._bytes += size
        self._metrics.queue_pages.set(self._pages)
        self._metrics.queue_bytes.set(self._bytes)

    def flush(self, timeout: float) -> bool:
        """Wait until nothing waits; False if `timeout` seconds passed first, or `close` did."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pages or self._closing.is_set(), timeout)
            return self._pages == 0

    def close(self, drain: float) -> None:
        """Go on for at most `drain` seconds, then stop; what is left stays marked."""
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
        """Upload; count an attempt if the tier has room, answers and yet takes nothing."""
        try:
            left = self._upload(run, staging)
        except TierError:
            return run.pages
        except Exception:  # the thread must go on, whatever this run met
            log.exception("upload failed", extra={"fields": {"pages": len(run.pages)}})
            left = run.pages
        refused = len(left) == len(run.pages) and self._breaker.state is BreakerState.CLOSED
        run.attempts += refused and not run.is_full
        return left

    def _settle(self, run: _Run, left: list[PendingPage]) -> None:
        """Take what is done out of the queue's count, put what is left first in line again."""
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
        """Upload what the shared tier lacks; return what is to be tried again.

        Raises `TierError` where the shared tier cannot even be asked.
        """
        lacking = self._lacking(run)
        pages = staging.pages(lacking)
        outcomes = self._local.fetch(pages, time.monotonic() + BATCH_SECONDS)
        readable = loaded_pages(pages, outcomes)
        stored = self._shared.spill(readable, time.monotonic() + BATCH_SECONDS)
        run.is_full = SpillResult.REFUSED in stored
        done = _keys(readable, [result <= SpillResult.PRESENT for result in stored])
        gone = _keys(pages, [fetched.result in GONE for fetched in outcomes])
        self._metrics.uploads_dropped.labels("evicted").inc(len(gone))
        left = [page for page in lacking if page.key not in done | gone]
        waiting = set(_page_keys(left))
        over = [page.key for page in run.pages if page.key not in waiting]
        uploaded = [key for key in over if key not in gone]
        self._marks.mark_uploaded(uploaded)  # a page that is gone may have been stored anew
        with self._changed:
            self._uploaded.add(uploaded)
        return left

    def _lacking(self, run: _Run) -> list[PendingPage]:
        """Return the pages that the shared tier does not hold.

        What a lookup finds is asked for page by page: it may have stepped over a page that is not
        there, or have gone by what is remembered, and a page taken for uploaded is not tried again.
        """
        deadline = time.monotonic() + BATCH_SECONDS
        keys = [page.key for page in run.pages]
        if run.chained:
            chain = Chain(keys[0].namespace, [key.hash for key in keys])
            keys = keys[: self._shared.lookup(chain, deadline).length]
        self._shared.invalidate(keys)
        present = self._shared.present(keys, deadline) if keys else []
        absent = [page for page, there in zip(run.pages, present, strict=False) if not there]
        return absent + run.pages[len(keys) :]


def _bytes(pages: Iterable[PendingPage]) -> int:
    return sum(page.length for page in pages)


def _page_keys(pages: Sequence[PendingPage]) -> list[PageKey]:
    return [page.key for page in pages]


def _keys(pages: Sequence[Page], chosen: Sequence[bool]) -> set[PageKey]:
    return {page.key for page, choose in zip(pages, chosen, strict=True) if choose}


def _split(pages: Iterable[PendingPage], *, chained: bool) -> list[_Run]:
    """Cut pages into runs of one namespace and at most `RUN_BYTES` (but one page at least)."""
    runs: list[_Run] = []
    room, namespace = 0, b""
    for page in pages:
        if not runs or page.length > room or page.key.namespace != namespace:
            runs.append(_Run([], chained))
            room, namespace = RUN_BYTES, page.key.namespace
        runs[-1].pages.append(page)
        room -= page.length
    return runs
