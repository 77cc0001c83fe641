"""Copy pages from the shared tier to this node's disk if they are likely to be used again."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

from memkv_sglang.engine.changed import ChangedPages
from memkv_sglang.engine.gate import NamespaceGate
from memkv_sglang.engine.recent import RecentPages
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page, PageKey, page_checksum
from memkv_sglang.tiers.base import SpillResult, Tier

log = logging.getLogger(__name__)

Rule = Literal["never", "second_use", "always"]

REMEMBERED_USES = 500_000
"""Number of pages whose first use is remembered."""

WRITE_SECONDS = 5.0
"""Seconds to write a batch to the disk."""


class Admission:
    """Decides which pages to copy to the disk. Not thread-safe.

    By default, a page must be used twice, because most blocks of published traces are used only
    once (76 % in the Mooncake trace, FAST'25, that this project replays).
    """

    def __init__(self, rule: Rule) -> None:
        """Decide by `rule`, the setting `engine.promote`."""
        self._rule = rule
        self._used = RecentPages(REMEMBERED_USES)

    def admits(self, key: PageKey) -> bool:
        """Record a use of a page; return whether to copy it."""
        if self._rule != "second_use":
            return self._rule == "always"
        if self._used.remove(key):
            return True
        self._used.add([key])
        return False


class Promoter:
    """Copies admitted pages and writes them to `local` in the background. Thread-safe."""

    def __init__(
        self,
        local: Tier,
        rule: Rule,
        budget: int,
        metrics: Metrics,
        changed: ChangedPages,
        gate: NamespaceGate,
    ) -> None:
        """Hold at most `budget` bytes of copies. Pages that do not fit are not promoted."""
        self._local = local
        self._gate = gate
        self._changed_pages = changed
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
        """Copy admitted pages in memory, to be written to the disk in the background.

        Each page must have the checksum that its tier verified. The client may change the page
        before it is copied, so only copies that match the checksum are written.
        """
        with self._changed:
            admitted = [page for page in pages if self._admission.admits(page.key)]
            batch: list[Page] = []
            for page in admitted:
                if self._held + page.length > self._budget:
                    self._metrics.promotion_pages.labels("no_space").inc(len(admitted) - len(batch))
                    break
                self._held += page.length
                batch.append(page)
        copies = [page._replace(buffers=(memoryview(b"".join(page.buffers)),)) for page in batch]
        if copies:
            with self._changed:
                self._batches.append(copies)
                self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all copies have been written. Returns False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._held == 0, timeout)

    def forget(self, namespace: bytes) -> None:
        """Discard the copies of a namespace that is being cleared."""
        with self._changed:
            batches, self._batches = self._batches, deque()
            for batch in batches:
                if batch[0].key.namespace == namespace:
                    self._release(batch)
                else:
                    self._batches.append(batch)

    def _write_all(self) -> None:
        while batch := self._next():
            with self._gate.enter(batch[0].key.namespace) as is_open:
                if not self._take(batch):  # its namespace was cleared meanwhile
                    continue
                if is_open:
                    self._write(batch)
            with self._changed:
                self._release(batch)

    def _write(self, batch: Sequence[Page]) -> None:
        intact = [page for page in batch if page_checksum(page.key, page.buffers) == page.checksum]
        if len(intact) < len(batch):
            self._metrics.promotion_pages.labels("changed").inc(len(batch) - len(intact))
            self._changed_pages.report("promotion", len(batch) - len(intact))
        try:
            results = self._local.spill(intact, time.monotonic() + WRITE_SECONDS)
        except Exception:  # This is a bug, but the thread must keep running.
            log.exception("cannot promote pages")
            results = [SpillResult.FAILED] * len(intact)
        for result in results:
            self._metrics.promotion_pages.labels(result.name.lower()).inc()

    def _release(self, batch: Sequence[Page]) -> None:
        """Free the memory of a batch. Call with the lock held."""
        self._held -= sum(page.length for page in batch)
        self._changed.notify_all()

    def _next(self) -> list[Page]:
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._closing)
            return self._batches[0] if self._batches and not self._closing else []

    def _take(self, batch: list[Page]) -> bool:
        """Remove the batch from the queue; return whether it was still queued."""
        with self._changed:
            is_next = bool(self._batches) and self._batches[0] is batch
            if is_next:
                self._batches.popleft()
            return is_next

    def close(self) -> None:
        """Finish writing the current batch and drop the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
