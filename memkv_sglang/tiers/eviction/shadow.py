"""Choose the reuse policy by simulating each one on a sample of this node's requests.

Miniature simulation (Waldspurger et al., "Cache Modeling and Optimization using Miniature
Simulations", USENIX ATC 2017): a cache of 1/k of the size that sees 1/k of the pages, sampled by
hash, has about the hit rate of the full cache. So this measures the hits of each policy instead of
estimating them, and needs no tuning.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable

from memkv_sglang.tiers.eviction.reuse_policy import MOST_USES, REUSE_POLICIES, ReusePolicy

SAMPLE_PAGES = 4096
"""Capacity of a simulated cache, in pages."""
HISTORY = 9
"""Number of pages whose uses are remembered, as a multiple of the capacity."""
HALF_LIFE = 4
"""Number of uses after which a hit counts half, as a multiple of the capacity."""
_LARGEST_WEIGHT = 1e100


class Shadow:
    """One simulated cache per policy. Not thread-safe."""

    def __init__(self, policies: tuple[ReusePolicy, ...] = REUSE_POLICIES) -> None:
        """Create empty caches. They are unbounded until the first `resize`."""
        self.mask = 0
        """A page is simulated if its fingerprint has none of these bits."""
        self.caches = [_Cache(policy) for policy in policies]
        self.best = self.caches[0]
        """The cache with the most hits. Recent hits count more."""
        self._history: OrderedDict[int, int] = OrderedDict()
        self._capacity: int | None = None
        self._tick = 0
        self._weight = self._growth = 1.0

    def resize(self, pages: int) -> None:
        """Simulate a tier that holds this many pages."""
        while pages > SAMPLE_PAGES * (self.mask + 1):
            self._halve_sample()
        self._capacity = max(1, pages // (self.mask + 1))
        self._growth = 0.5 ** (-1 / (HALF_LIFE * self._capacity))
        for cache in self.caches:
            cache.resize(pages)

    def use(self, fingerprints: Iterable[int]) -> None:
        """Simulate the use of pages, in the order of their ticks."""
        for fingerprint in fingerprints:
            if not fingerprint & self.mask:
                self._use(fingerprint)
        while len(self._history) > HISTORY * SAMPLE_PAGES:
            self._halve_sample()

    def choose(self) -> ReusePolicy:
        """Return the policy with the most hits. In a tie, it is the one that was best before."""
        leader = max(self.caches, key=lambda cache: cache.hits)
        if leader.hits > self.best.hits:
            self.best = leader
        return self.best.policy

    def _use(self, fingerprint: int) -> None:
        self._tick += self.mask + 1
        uses = min(self._history.pop(fingerprint, -1) + 1, MOST_USES)
        self._history[fingerprint] = uses
        if self._capacity is not None and len(self._history) > HISTORY * self._capacity:
            self._history.popitem(last=False)
        self._weight *= self._growth
        for cache in self.caches:
            cache.use(fingerprint, self._tick, uses, self._weight, self._capacity)
        if self._weight > _LARGEST_WEIGHT:
            for cache in self.caches:
                cache.hits /= self._weight
            self._weight = 1.0

    def _halve_sample(self) -> None:
        self.mask = 2 * self.mask + 1
        self._history = OrderedDict((f, n) for f, n in self._history.items() if not f & self.mask)
        for cache in self.caches:
            cache.keep_sample(self.mask)


class _Cache:
    """A simulated cache with one policy."""

    def __init__(self, policy: ReusePolicy) -> None:
        self.policy = policy
        self.hits = 0.0
        """Number of hits, of which recent ones count more."""
        self._bonuses = policy.bonuses(0)
        self._ranks: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        """Ranks and fingerprints of pages. Outdated ranks are skipped."""

    def resize(self, pages: int) -> None:
        self._bonuses = self.policy.bonuses(pages)

    def use(
        self, fingerprint: int, tick: int, uses: int, weight: float, capacity: int | None
    ) -> None:
        if fingerprint in self._ranks:
            self.hits += weight
        self._ranks[fingerprint] = rank = tick + self._bonuses[uses]
        heapq.heappush(self._heap, (rank, fingerprint))
        while capacity is not None and len(self._ranks) > capacity:
            rank, coldest = heapq.heappop(self._heap)
            if self._ranks.get(coldest) == rank:
                del self._ranks[coldest]
        if len(self._heap) > 4 * len(self._ranks):
            self._rebuild()

    def keep_sample(self, mask: int) -> None:
        self._ranks = {f: rank for f, rank in self._ranks.items() if not f & mask}
        self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(rank, fingerprint) for fingerprint, rank in self._ranks.items()]
        heapq.heapify(self._heap)
