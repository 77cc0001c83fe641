"""Simulate the NVMe tier's eviction without files. Pages are numbers.

It runs the tier's own `EvictionOrder` and `Victims`; a test compares it with the tier itself.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PageKey
from memkv_sglang.tiers.eviction import EvictionOrder, PolicyChooser, Victims

NAMESPACE = bytes(NAMESPACE_DIGEST_SIZE)
_CHUNK = 4096


@lru_cache(1 << 17)
def page_hash(page: int) -> bytes:
    """Return a page hash, 32 bytes that look random as a SHA-256 does."""
    return hashlib.sha256(page.to_bytes(8, "little", signed=True)).digest()


class SimulatedDisk:
    """An NVMe tier without files. It evicts runs of consecutive pages of a chain.

    A chain is given as a list of run numbers, and its length in pages. Only the last run may be
    shorter than `run` pages. It keeps its number as it grows. With one page per run, it evicts page
    by page, like the tier.
    """

    def __init__(self, pages: int, run: int = 1, chooser: PolicyChooser | None = None) -> None:
        """Create an empty disk that holds `pages` pages, handled `run` at a time.

        Disks of one tier share a `chooser`.
        """
        self.order = EvictionOrder(chooser)
        self.written = 0
        """Pages stored."""
        self.exempt: set[int] = set()
        """Runs that must not be evicted, such as those waiting for upload."""
        self._capacity = pages
        self._run = run
        self._held = 0
        """Pages held."""
        self._entries: dict[int, int] = {}
        self._runs: list[int | None] = []
        self._sizes: list[int] = []
        self._unused: list[int] = []
        self._pinned: set[int] = set()
        self._victims = Victims(self.order, self._chunks, self._is_evictable)

    def __contains__(self, run: int) -> bool:
        return run in self._entries

    @property
    def held(self) -> int:
        """Number of pages held."""
        return self._held

    def size(self, run: int) -> int:
        """Return how many pages of a run are stored, without recording a use."""
        entry = self._entries.get(run)
        return 0 if entry is None else self._sizes[entry]

    def lookup(self, runs: Sequence[int], pages: int | None = None) -> int:
        """Return the length of the stored prefix in pages, and record its use."""
        entries, length = [], 0
        last = len(runs) - 1
        for i, run in enumerate(runs):
            entry = self._entries.get(run)
            if entry is None:
                break
            entries.append(entry)
            wanted = self._run if i < last or pages is None else pages - self._run * last
            length += min(wanted, self._sizes[entry])
            if self._sizes[entry] < wanted:
                break
        self.order.use(NAMESPACE, [page_hash(run) for run in runs[: len(entries)]], entries)
        return length

    def spill(self, runs: Sequence[int], pages: int | None = None, start: int = 0) -> int:
        """Store the missing runs from number `start` on.

        Stores only what fits without evicting this chain. Records a use of the whole chain. Returns
        the number of pages written.
        """
        present, missing = [], []
        growth: list[tuple[int, int]] = []
        last = len(runs) - 1
        for i, run in enumerate(runs):
            wanted = self._run if i < last or pages is None else pages - self._run * last
            entry = self._entries.get(run)
            if entry is None:
                if i >= start:
                    missing.append((run, wanted))
            else:
                present.append(entry)
                if self._sizes[entry] < wanted:
                    growth.append((entry, wanted - self._sizes[entry]))
        needed = sum(size for _, size in missing) + sum(more for _, more in growth)
        before = self.written
        if needed:
            self._pinned = set(present)
            room = self._free_space(needed)
            self._pinned.clear()
            self._store(growth, missing, room)
        self.order.touch(present)
        return self.written - before

    def _free_space(self, count: int) -> int:
        """Evict until `count` pages fit, if possible; return how many pages fit."""
        lacking = min(count, self._capacity) - (self._capacity - self._held)
        while lacking > 0 and (evicted := self._evict(-(-lacking // self._run))):
            lacking -= evicted
        return self._capacity - self._held

    def _evict(self, count: int) -> int:
        """Evict like `SpaceReclaimer._evict`; return the number of pages evicted."""
        evicted, taken, held = 0, 0, len(self._entries)
        self.order.adapt(held)
        while taken < count and (victims := self._victims.take(held, count - taken)):
            taken += len(victims)
            evicted += self._drop([entry for _, entry in victims])
        if not evicted:
            coldest = self.order.coldest(self._chunks(), self._is_unpinned, count, by_age=True)
            evicted = self._drop([entry for _, entry in coldest])
        return evicted

    def _drop(self, victims: Sequence[int]) -> int:
        self.order.remember_evicted((self._key(entry), entry) for entry in victims)
        dropped = 0
        for entry in victims:
            run = self._runs[entry]
            assert run is not None
            del self._entries[run]
            self._runs[entry] = None
            self._unused.append(entry)
            dropped += self._sizes[entry]
        self._held -= dropped
        return dropped

    def _store(
        self, growth: Sequence[tuple[int, int]], missing: Sequence[tuple[int, int]], room: int
    ) -> None:
        for entry, more in growth:
            if more > room:
                return
            room -= more
            self._sizes[entry] += more
            self._count_written(more)
        fitting = []
        for run, size in missing:
            if size > room:
                break
            room -= size
            fitting.append((run, size))
        self._publish(fitting)

    def _publish(self, runs: Sequence[tuple[int, int]]) -> None:
        tick = self.order.reserve_ticks(len(runs)) + len(runs)
        added = []
        for run, size in runs:
            tick -= 1
            if self._unused:
                entry = self._unused.pop()
                self._runs[entry], self._sizes[entry] = run, size
            else:
                entry = len(self._runs)
                self._runs.append(run)
                self._sizes.append(size)
            self._entries[run] = entry
            self.order.set_tick(entry, tick)
            added.append((self._key(entry), entry))
            self._count_written(size)
        self.order.add(added)

    def _count_written(self, pages: int) -> None:
        self.written += pages
        self._held += pages

    def _key(self, entry: int) -> PageKey:
        run = self._runs[entry]
        assert run is not None
        return PageKey(NAMESPACE, page_hash(run))

    def _chunks(self) -> Iterator[Sequence[int]]:
        entries = list(self._entries.values())
        return (entries[first : first + _CHUNK] for first in range(0, len(entries), _CHUNK))

    def _is_evictable(self, entry: int) -> bool:
        return self._is_unpinned(entry) and not self.order.is_being_spilled(entry)

    def _is_unpinned(self, entry: int) -> bool:
        run = self._runs[entry]
        return run is not None and entry not in self._pinned and run not in self.exempt
