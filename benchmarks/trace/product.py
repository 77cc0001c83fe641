"""A simulation of the NVMe tier's eviction, without files: pages are numbers."""

from collections.abc import Iterator, Sequence

from benchmarks.trace.peers import Cache
from benchmarks.trace.requests import page_hash
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PageKey
from memkv_sglang.tiers.eviction import EvictionOrder, Victims

NAMESPACE = bytes(NAMESPACE_DIGEST_SIZE)
_CHUNK = 4096


class ProductCache(Cache):
    """Uses `EvictionOrder` like the NVMe tier does; a test compares the two."""

    def __init__(self, pages: int) -> None:
        """See `Cache`."""
        super().__init__(pages)
        self.order = EvictionOrder()
        self.written = 0
        """Pages stored."""
        self._entries: dict[int, int] = {}
        self._pages: list[int | None] = []
        self._unused: list[int] = []
        self._pinned: set[int] = set()
        self._victims = Victims(self.order, self._chunks, self._is_evictable)

    def __contains__(self, page: int) -> bool:
        return page in self._entries

    def request(self, pages: Sequence[int]) -> int:
        """Look the prompt up, then spill its missing pages."""
        hits = self.lookup(pages)
        self.spill(pages)
        return hits

    def lookup(self, pages: Sequence[int]) -> int:
        """Return the length of the cached prefix, and record its use."""
        length = next((i for i, page in enumerate(pages) if page not in self), len(pages))
        found = [self._entries[page] for page in pages[:length]]
        self.order.use(NAMESPACE, [page_hash(page) for page in pages[:length]], found)
        return length

    def spill(self, pages: Sequence[int]) -> None:
        """Store the missing pages, as many as fit without evicting the prompt's other pages."""
        present = [self._entries[page] for page in pages if page in self]
        self._pinned = set(present)
        fresh = [page for page in pages if page not in self]
        free = self._free_space(len(fresh))
        self._pinned.clear()
        self._publish(fresh[:free])
        self.order.touch(present)

    def _free_space(self, count: int) -> int:
        held = len(self._entries)
        lacking = min(count, self._capacity) - (self._capacity - held)
        if lacking <= 0:
            return count
        while lacking > 0 and (evicted := self._evict(lacking)):
            lacking -= evicted
        return self._capacity - len(self._entries)

    def _evict(self, count: int) -> int:
        """Do the same as `SpaceReclaimer._evict`."""
        evicted, held = 0, len(self._entries)
        self.order.adapt(held)
        while evicted < count and (victims := self._victims.take(held, count - evicted)):
            evicted += self._drop([entry for _, entry in victims])
        if not evicted:
            coldest = self.order.coldest(self._chunks(), self._is_unpinned, count, by_age=True)
            evicted = self._drop([entry for _, entry in coldest])
        return evicted

    def _drop(self, victims: Sequence[int]) -> int:
        self.order.remember_evicted((self._key(entry), entry) for entry in victims)
        for entry in victims:
            page = self._pages[entry]
            assert page is not None
            del self._entries[page]
            self._pages[entry] = None
            self._unused.append(entry)
        return len(victims)

    def _publish(self, pages: Sequence[int]) -> None:
        tick = self.order.reserve_ticks(len(pages)) + len(pages)
        self.written += len(pages)
        added = []
        for page in pages:
            tick -= 1
            if self._unused:
                entry = self._unused.pop()
                self._pages[entry] = page
            else:
                entry = len(self._pages)
                self._pages.append(page)
            self._entries[page] = entry
            self.order.set_tick(entry, tick)
            added.append((self._key(entry), entry))
        self.order.add(added)

    def _key(self, entry: int) -> PageKey:
        page = self._pages[entry]
        assert page is not None
        return PageKey(NAMESPACE, page_hash(page))

    def _chunks(self) -> Iterator[Sequence[int]]:
        entries = list(self._entries.values())
        return (entries[first : first + _CHUNK] for first in range(0, len(entries), _CHUNK))

    def _is_evictable(self, entry: int) -> bool:
        return self._is_unpinned(entry) and not self.order.is_being_spilled(entry)

    def _is_unpinned(self, entry: int) -> bool:
        return self._pages[entry] is not None and entry not in self._pinned
