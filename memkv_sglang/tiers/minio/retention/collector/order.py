"""The eviction order of pages, based only on the time of each page's last modification.

The first use of a page in each period updates its LastModified (see `access_time_updater`), so that
LastModified lies in the period of the last use. Using a page uses all its ancestors, so a root is
never in an earlier period than its leaves, and within a period it was modified before them.
Therefore the oldest period is evicted first, and within a past period the latest page first: leaves
always before roots. In the current period all pages are in use, and the oldest is evicted first.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

from memkv_sglang.page import PageKey


class StoredPage(NamedTuple):
    """A page in the bucket."""

    key: PageKey
    size: int
    """Bytes."""
    modified: float
    """When it was last modified, in seconds by the server's clock."""


Order = tuple[int, float]
"""Sort key: pages with smaller keys are evicted first."""


def eviction_order(period: float, now: float) -> Callable[[float], Order]:
    """Return a function from modification time to sort key, for periods of `period` seconds."""
    current = now // period

    def order(modified: float) -> Order:
        own = modified // period
        return int(own), (-modified if own < current else modified)

    return order


class EvictionQueue:
    """Keeps the `limit` pages to evict first, which bounds the memory of a collection."""

    def __init__(self, order: Callable[[float], Order], limit: int) -> None:
        """Start empty."""
        self._order = order
        self._limit = limit
        self._heap: list[tuple[int, float, PageKey, int, float]] = []
        self.overflowed = False
        """Whether more pages were offered."""

    def offer(self, page: StoredPage) -> None:
        """Add a page, unless `limit` others are evicted before it."""
        period, within = self._order(page.modified)
        # Negative, so that the first item of the heap is the last page to evict.
        item = (-period, -within, page.key, page.size, page.modified)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, item)
            return
        self.overflowed = True
        if item > self._heap[0]:
            heapq.heapreplace(self._heap, item)

    def take(self) -> list[StoredPage]:
        """Remove and return the pages in eviction order."""
        items, self._heap = sorted(self._heap, reverse=True), []
        return [StoredPage(key, size, modified) for _, _, key, size, modified in items]
