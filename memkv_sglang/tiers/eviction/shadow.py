"""Which valuation keeps the pages that are wanted: each is tried on a sample of the pages.

Miniature simulation (Waldspurger et al., "Cache Modeling and Optimization using Miniature
Simulations", USENIX ATC 2017): a cache of a k-th of the size that sees a k-th of the pages, chosen
by their hash, has about the hit rate of the whole. So what each valuation would have brought is
counted, not guessed, on this node's own requests, and nothing has to be tuned for them.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable

from memkv_sglang.tiers.eviction.reuse_policy import MOST_USES, VALUATIONS, ReusePolicy

SAMPLE_PAGES = 4096
"""Pages that each simulated cache holds at most."""
HISTORY = 9
"""Pages whose uses are remembered, as a multiple of those that are held."""
HALF_LIFE = 4
"""Uses after which a hit counts half, as a multiple of the pages that are held."""
_LARGEST_WEIGHT = 1e100


class Shadow:
    """Simulated caches side by side. Not thread-safe."""

    def __init__(self, valuations: tuple[ReusePolicy, ...] = VALUATIONS) -> None:
        """Begin empty, and without a bound: until `resize` nothing has to leave."""
        self.mask = 0
        """Pages take part whose fingerprint has none of these bits."""
        self.caches = [_Cache(valuation) for valuation in valuations]
        self.best = self.caches[0]
        """The one with the most hits, recent ones weighing more."""
        self._history: OrderedDict[int, int] = OrderedDict()
        self._room: int | None = None
        self._tick = 0
        self._weight = self._growth = 1.0

    def resize(self, pages: int) -> None:
        """Simulate a tier that holds so many pages."""
        while pages > SAMPLE_PAGES * (self.mask + 1):
            self._thin()
        self._room = max(1, pages // (self.mask + 1))
        self._growth = 0.5 ** (-1 / (HALF_LIFE * self._room))
        for cache in self.caches:
            cache.value(pages)

    def use(self, fingerprints: Iterable[int]) -> None:
        """Note the use of pages in the sample, in the order of their ticks."""
        for fingerprint in fingerprints:
            if not fingerprint & self.mask:
                self._use(fingerprint)
        while len(self._history) > HISTORY * SAMPLE_PAGES:
            self._thin()

    def choose(self) -> ReusePolicy:
        """Return the valuation that has proved best; on a tie the one that was best before."""
        leader = max(self.caches, key=lambda cache: cache.hits)
        if leader.hits > self.best.hits:
            self.best = leader
        return self.best.valuation

    def _use(self, fingerprint: int) -> None:
        self._tick += self.mask + 1
        uses = min(self._history.pop(fingerprint, -1) + 1, MOST_USES)
        self._history[fingerprint] = uses
        if self._room is not None and len(self._history) > HISTORY * self._room:
            self._history.popitem(last=False)
        self._weight *= self._growth
        for cache in self.caches:
            cache.use(fingerprint, self._tick, uses, self._weight, self._room)
        if self._weight > _LARGEST_WEIGHT:
            for cache in self.caches:
                cache.hits /= self._weight
            self._weight = 1.0

    def _thin(self) -> None:
        """Go on with half of the sample."""
        self.mask = 2 * self.mask + 1
        self._history = OrderedDict((f, n) for f, n in self._history.items() if not f & self.mask)
        for cache in self.caches:
            cache.thin(self.mask)


class _Cache:
    """A simulated cache under one valuation."""

    def __init__(self, valuation: ReusePolicy) -> None:
        self.valuation = valuation
        self.hits = 0.0
        """Weighted."""
        self._bonuses = valuation.bonuses(0)
        self._ranks: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        """Rank and fingerprint; also ranks of earlier uses, which are passed over."""

    def value(self, pages: int) -> None:
        self._bonuses = self.valuation.bonuses(pages)

    def use(self, fingerprint: int, tick: int, uses: int, weight: float, room: int | None) -> None:
        if fingerprint in self._ranks:
            self.hits += weight
        self._ranks[fingerprint] = rank = tick + self._bonuses[uses]
        heapq.heappush(self._heap, (rank, fingerprint))
        while room is not None and len(self._ranks) > room:
            rank, coldest = heapq.heappop(self._heap)
            if self._ranks.get(coldest) == rank:
                del self._ranks[coldest]
        if len(self._heap) > 4 * len(self._ranks):
            self._rebuild()

    def thin(self, mask: int) -> None:
        self._ranks = {f: rank for f, rank in self._ranks.items() if not f & mask}
        self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(rank, fingerprint) for fingerprint, rank in self._ranks.items()]
        heapq.heapify(self._heap)
