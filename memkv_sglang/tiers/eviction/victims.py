"""A queue of the next pages to evict, refilled by scanning all pages."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from memkv_sglang.tiers.eviction.order import EvictionOrder

_SCAN_SHARE = 32
"""A scan selects 1 of this many pages, so evicting a page costs looking at this many pages."""
_MIN_BATCH = 8


class Victims:
    """A queue of the entries to evict first. Not thread-safe."""

    def __init__(
        self,
        order: EvictionOrder,
        entries: Callable[[], Iterable[Sequence[int]]],
        is_evictable: Callable[[int], bool],
        max_batch: int | None = 4096,
    ) -> None:
        """Choose from those `entries`, given in chunks, for which `is_evictable` is true.

        A scan blocks the caller, and selects at most `max_batch` entries.
        """
        self._max_batch = max_batch
        self._order = order
        self._entries = entries
        self._is_evictable = is_evictable
        self._queue: deque[tuple[int, int]] = deque()
        self._queued: set[int] = set()
        """The entries of the last scan. Some of them may have left the queue."""

    def peek(self, pages: int) -> int | None:
        """Return the rank of the next victim; None if no entry can be evicted.

        `pages` is the number of pages in the tier.
        """
        if (rank := self._first_valid()) is None:
            count = max(pages // _SCAN_SHARE, _MIN_BATCH)
            if self._max_batch is not None:
                count = min(count, self._max_batch)
            self._queue.extend(self._order.coldest(self._entries(), self._is_evictable, count))
            self._queued = {entry for _, entry in self._queue}
            rank = self._first_valid()
        return rank

    def take(self, pages: int, count: int) -> list[tuple[int, int]]:
        """Return rank and entry of up to `count` pages, in eviction order; empty if there are none.

        The caller must evict or use each returned entry before the next call.
        """
        victims: list[tuple[int, int]] = []
        rank = self.peek(pages)
        while rank is not None and len(victims) < count:
            victims.append(self._queue.popleft())
            rank = self._first_valid()
        return victims

    def replace(self, successors: Mapping[int, int]) -> None:
        """Replace queued entries whose pages have moved, so that these pages stay queued."""
        if not self._queued.isdisjoint(successors):
            self._queue = deque((rank, successors.get(e, e)) for rank, e in self._queue)
            self._queued = {entry for _, entry in self._queue}

    def _first_valid(self) -> int | None:
        """Skip entries used or evicted since the scan; return the rank of the next one."""
        while self._queue:
            rank, entry = self._queue[0]
            if self._order.rank(entry) == rank and self._is_evictable(entry):
                return rank
            self._queue.popleft()
        return None
