"""Copies from the shared tier to this node's disk, for pages that are likely to be wanted again."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

from memkv_sglang.engine.recent import RecentPages
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import SpillResult, Tier

log = logging.getLogger(__name__)

Rule = Literal["never", "second_use", "always"]

REMEMBERED_USES = 500_000
"""Pages whose first use is remembered."""

WRITE_SECONDS = 5.0
"""Longest time for a batch of copies to reach the disk."""


class Admission:
    """Decides which pages go to the disk. Not thread-safe.

    Most blocks of published traces are read once (Mooncake, FAST'25: 76 % in the trace that this
    project replays), so by default a page must be asked for twice.
    """

    def __init__(self, rule: Rule) -> None:
        """Follow `rule`."""
        self._rule = rule
        self._used = RecentPages(REMEMBERED_USES)

    def admits(self, key: PageKey) -> bool:
        """Take note of a use and tell whether the page is to be kept."""
        if self._rule != "second_use":
            return self._rule == "always"
        if self._used.remove(key):
            return True
        self._used.add([key])
        return False


class Promoter:
    """Writes admitted pages to `local` behind the caller's back, from copies of their content."""

    def __init__(self, local: Tier, rule: Rule, budget: int, metrics: Metrics) -> None:
        """Hold at most `budget` bytes of copies; what finds no room is not promoted."""
        self._local = local
        self._admission = Admission(rule)
        self._budget = budget
        self._metrics = metrics
        self._batches: deque[list[Page]] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="memkv-promote", daemon=True)
        self._thread.start()

    def offer(self, pages: Sequence[Page]) -> None:
        """Copy the pages that are admitted; blocks for the copy in memory only."""
        with self._changed:
            admitted = [page for page in pages if self._admission.admits(page.key)]
            batch: list[Page] = []
            for page in admitted:
                if self._held + page.length > self._budget:
                    self._metrics.promoted.labels("no_room").inc(len(admitted) - len(batch))
                    break
                self._held += page.length
                batch.append(page)
        copies = [Page(page.key, (memoryview(b"".join(page.buffers)),)) for page in batch]
        if copies:
            with self._changed:
                self._batches.append(copies)
                self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until every copy is on the disk; False if `timeout` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held == 0, timeout)

    def _write_all(self) -> None:
        while batch := self._next():
            try:
                results = self._local.spill(batch, time.monotonic() + WRITE_SECONDS)
            except Exception:  # a defect; the thread must go on
                log.exception("pages not promoted")
                results = [SpillResult.FAILED] * len(batch)
            for result in results:
                self._metrics.promoted.labels(result.name.lower()).inc()
            with self._changed:
                self._held -= sum(page.length for page in batch)
                self._changed.notify_all()

    def _next(self) -> list[Page]:
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._closing)
            return self._batches.popleft() if self._batches and not self._closing else []

    def close(self) -> None:
        """Let the batch in hand reach the disk, drop the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
