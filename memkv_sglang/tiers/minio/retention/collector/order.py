"""Which pages leave first, by nothing but the time at which each was written or touched last.

The first use of a page in each period of time is noted by touching it (see `touch`), so that an
object's LastModified lies in the period of the page's last use. A use of a page is a use of all
pages before it in its chain; within one period a root is therefore never later than its leaves,
and over periods never in an earlier one. So whole periods leave, the oldest one first, and within
a period that is over the latest page first: leaves before roots, always. In the present period
nothing is known yet but that the pages are in use; there the oldest goes first.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

from memkv_sglang.page import PageKey


class StoredPage(NamedTuple):
    """A page of the bucket."""

    key: PageKey
    size: int
    """Bytes."""
    modified: float
    """When it was written or touched last, in seconds by the server's clock."""


Order = tuple[int, float]
"""Pages with smaller ones leave earlier."""


def leaving_order(period: float, now: float) -> Callable[[float], Order]:
    """Return the order by time of last modification; periods have so many seconds."""
    present = now // period

    def order(modified: float) -> Order:
        own = modified // period
        return int(own), (-modified if own < present else modified)

    return order


class FirstToLeave:
    """Of all pages offered, the `limit` first to leave; bounds the memory of a collection."""

    def __init__(self, order: Callable[[float], Order], limit: int) -> None:
        """Begin with none."""
        self._order = order
        self._limit = limit
        self._heap: list[tuple[int, float, PageKey, int, float]] = []
        self.overflowed = False
        """Whether there were more."""

    def offer(self, page: StoredPage) -> None:
        """Consider a page."""
        period, within = self._order(page.modified)
        # The heap's first is the last to leave: hence the signs.
        item = (-period, -within, page.key, page.size, page.modified)
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, item)
            return
        self.overflowed = True
        if item > self._heap[0]:
            heapq.heapreplace(self._heap, item)

    def take(self) -> list[StoredPage]:
        """Return the pages, the first to leave first, and forget them."""
        items, self._heap = sorted(self._heap, reverse=True), []
        return [StoredPage(key, size, modified) for _, _, key, size, modified in items]
