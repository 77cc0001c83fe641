"""The order in which pages leave: least recently used first."""

import heapq
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Sequence

from memkv_sglang.tiers.nvme.slots import NO_ENTRY


class Recency:
    """When each entry was used last, in ticks of a counter.

    Within one use of a chain the leaf gets the oldest tick, so that leaves leave before roots.
    """

    def __init__(self) -> None:
        self.ticks = array("Q")
        """Tick of the last use, by entry."""
        self._next = 1
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        """Return the first of `count` ticks that are later than all before."""
        with self._lock:
            first = self._next
            self._next += count
        return first

    def advance_past(self, tick: int) -> None:
        """Make all ticks to come later than this one."""
        with self._lock:
            self._next = max(self._next, tick + 1)

    def set(self, entry: int, tick: int) -> None:
        """Say when an entry was used, which may be a new one."""
        if entry == len(self.ticks):
            self.ticks.append(tick)
        else:
            self.ticks[entry] = tick

    def touch(self, entries: Sequence[int]) -> None:
        """Note that pages of a chain are used now; given root first."""
        ticks = self.ticks
        tick = self.take(len(entries))
        for entry in reversed(entries):
            ticks[entry] = tick
            tick += 1

    def coldest(
        self, chunks: Iterable[Sequence[int]], may_leave: Callable[[int], bool], count: int
    ) -> list[tuple[int, int]]:
        """Return last tick and id of the `count` coldest entries that may leave, in order.

        Lets other threads run between the chunks, so these should be short; `NO_ENTRY` is none.
        """
        ticks = self.ticks
        coldest: list[tuple[int, int]] = []
        bound = 1 << 64
        for chunk in chunks:
            coldest += [
                (tick, entry)
                for entry in chunk
                if entry != NO_ENTRY and (tick := ticks[entry]) < bound and may_leave(entry)
            ]
            if len(coldest) >= 2 * count:
                coldest = heapq.nsmallest(count, coldest)
                bound = coldest[-1][0]
            time.sleep(0)
        return sorted(coldest)[:count]
