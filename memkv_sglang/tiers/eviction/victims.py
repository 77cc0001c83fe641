"""The next pages to leave, found by a scan now and then."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from memkv_sglang.tiers.eviction.order import EvictionOrder

_SCAN_SHARE = 32
"""A scan finds this part of the pages, so that a page costs a look at so many others."""
_FEWEST = 8


class Victims:
    """A queue of the entries that leave first. Not thread-safe."""

    def __init__(
        self,
        order: EvictionOrder,
        entries: Callable[[], Iterable[Sequence[int]]],
        may_leave: Callable[[int], bool],
        at_once: int | None = 4096,
    ) -> None:
        """Choose among `entries`, given in chunks, those that `may_leave`.

        A scan, which callers wait for, finds `at_once` of them at most.
        """
        self._at_once = at_once
        self._order = order
        self._entries = entries
        self._may_leave = may_leave
        self._queue: deque[tuple[int, int]] = deque()
        self._found: set[int] = set()
        """Entries that may be in the queue."""

    def peek(self, pages: int) -> int | None:
        """Return the rank of the first to leave, None if there is none; `pages`: how many exist."""
        if (rank := self._first_valid()) is None:
            count = max(pages // _SCAN_SHARE, _FEWEST)
            if self._at_once is not None:
                count = min(count, self._at_once)
            self._queue.extend(self._order.coldest(self._entries(), self._may_leave, count))
            self._found = {entry for _, entry in self._queue}
            rank = self._first_valid()
        return rank

    def take(self, pages: int, count: int) -> list[tuple[int, int]]:
        """Return rank and id of up to `count` entries, in the order in which they leave.

        Returns none only if none may leave. They must be evicted or used before the next call.
        """
        victims: list[tuple[int, int]] = []
        rank = self.peek(pages)
        while rank is not None and len(victims) < count:
            victims.append(self._queue.popleft())
            rank = self._first_valid()
        return victims

    def follow(self, successors: Mapping[int, int]) -> None:
        """Note that other entries stand for some pages from now on: else these would stay."""
        if not self._found.isdisjoint(successors):
            self._queue = deque((rank, successors.get(e, e)) for rank, e in self._queue)
            self._found = {entry for _, entry in self._queue}

    def _first_valid(self) -> int | None:
        """Drop from the queue what was used or left since the scan; return its first rank then."""
        while self._queue:
            rank, entry = self._queue[0]
            if self._order.rank(entry) == rank and self._may_leave(entry):
                return rank
            self._queue.popleft()
        return None
