"""The NVMe tier's decisions without its files: the same order and victims, on numbers."""

from collections.abc import Iterator, Sequence

from benchmarks.trace.peers import Cache
from benchmarks.trace.requests import page_hash
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PageKey
from memkv_sglang.tiers.eviction import EvictionOrder, Victims

NAMESPACE = bytes(NAMESPACE_DIGEST_SIZE)
_CHUNK = 4096


class ProductCache(Cache):
    """Does with `EvictionOrder` what the NVMe tier does; a test compares the two."""

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
        self._victims = Victims(self.order, self._chunks, self._may_leave)

    def __contains__(self, page: int) -> bool:
        return page in self._entries

    def request(self, pages: Sequence[int]) -> int:
        """See `Cache`: a lookup, and a spill of what was not there."""
        hits = self.lookup(pages)
        self.spill(pages)
        return hits

    def lookup(self, pages: Sequence[int]) -> int:
        """Return the length of the prefix, which is used by that."""
        length = next((i for i, page in enumerate(pages) if page not in self), len(pages))
        found = [self._entries[page] for page in pages[:length]]
        self.order.use(NAMESPACE, [page_hash(page) for page in pages[:length]], found)
        return length

    def spill(self, pages: Sequence[int]) -> None:
        """Store those that are not there, as far as there is room beside the others."""
        present = [self._entries[page] for page in pages if page in self]
        self._pinned = set(present)
        fresh = [page for page in pages if page not in self]
        room = self._make_room(len(fresh))
        self._pinned.clear()
        self._publish(fresh[:room])
        self.order.touch(present)

    def _make_room(self, count: int) -> int:
        held = len(self._entries)
        lacking = min(count, self._room) - (self._room - held)
        if lacking <= 0:
            return count
        self.order.adapt(held)
        while lacking > 0 and (victims := self._victims.take(held, lacking)):
            lacking -= len(victims)
            self.order.leave((self._key(entry), entry) for _, entry in victims)
            for _, entry in victims:
                self._drop(entry)
        return self._room - len(self._entries)

    def _drop(self, entry: int) -> None:
        page = self._pages[entry]
        assert page is not None
        del self._entries[page]
        self._pages[entry] = None
        self._unused.append(entry)

    def _publish(self, pages: Sequence[int]) -> None:
        tick = self.order.take(len(pages)) + len(pages)
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
            self.order.set(entry, tick)
            added.append((self._key(entry), entry))
        self.order.enter(added)

    def _key(self, entry: int) -> PageKey:
        page = self._pages[entry]
        assert page is not None
        return PageKey(NAMESPACE, page_hash(page))

    def _chunks(self) -> Iterator[Sequence[int]]:
        entries = list(self._entries.values())
        return (entries[first : first + _CHUNK] for first in range(0, len(entries), _CHUNK))

    def _may_leave(self, entry: int) -> bool:
        return self._pages[entry] is not None and entry not in self._pinned
