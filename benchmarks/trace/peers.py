"""Other eviction policies, to compare with the NVMe tier's. Each cache holds `pages` pages."""

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence

from benchmarks.trace.requests import Requests


class Cache(ABC):
    """A cache of pages."""

    def __init__(self, pages: int) -> None:
        """Create an empty cache that holds `pages` pages."""
        self._capacity = pages

    @abstractmethod
    def __contains__(self, page: int) -> bool:
        """Return whether a page is cached."""

    @abstractmethod
    def request(self, pages: Sequence[int]) -> int:
        """Serve a prompt; return how many pages of its prefix were already cached."""


class PeerCache(Cache):
    """A cache that knows nothing of chains, and handles a prompt's pages one by one."""

    leaf_first = True
    """Whether a prompt's pages are used from the last to the first, so that the first is the most
    recent."""

    def request(self, pages: Sequence[int]) -> int:
        """See `Cache`."""
        hits = next((i for i, page in enumerate(pages) if page not in self), len(pages))
        for page in reversed(pages) if self.leaf_first else pages:
            self.use(page)
        return hits

    @abstractmethod
    def use(self, page: int) -> None:
        """Record a use. If the page is missing, store it, and evict others if necessary."""


class Lru(PeerCache):
    """Evicts the least recently used page."""

    def __init__(self, pages: int) -> None:
        """See `Cache`."""
        super().__init__(pages)
        self._held: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._held

    def use(self, page: int) -> None:
        """See `PeerCache`."""
        self._held[page] = None
        self._held.move_to_end(page)
        if len(self._held) > self._capacity:
            self._held.popitem(last=False)


class S3Fifo(PeerCache):
    """Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.

    A tenth of the capacity is a queue for new pages. Pages that are used there move to the main
    queue. The others are evicted to a ghost list, which has the length of the main queue. Pages
    used again while on the ghost list go to the main queue.
    """

    promoted_at = 1
    """Number of uses that promote a page from the small to the main queue. The authors' code has 1
    or 2."""

    def __init__(self, pages: int) -> None:
        """See `Cache`."""
        super().__init__(pages)
        self._small_capacity = max(1, pages // 10)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._uses: dict[int, int] = {}
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._uses

    def use(self, page: int) -> None:
        """See `PeerCache`."""
        if page in self._uses:
            self._uses[page] = min(3, self._uses[page] + 1)
            return
        while len(self._uses) >= self._capacity:
            self._evict()
        if page in self._ghosts:
            del self._ghosts[page]
            self._main.append(page)
        else:
            self._small.append(page)
        self._uses[page] = 0

    def _evict(self) -> None:
        if len(self._small) >= self._small_capacity or not self._main:
            while self._small:
                page = self._small.popleft()
                if self._uses[page] < self.promoted_at:
                    self._forget(page)
                    return
                self._uses[page] = 0
                self._main.append(page)
                if len(self._main) > self._capacity - self._small_capacity:
                    break
        while self._main:
            page = self._main.popleft()
            if not self._uses[page]:
                del self._uses[page]
                return
            self._uses[page] -= 1
            self._main.append(page)

    def _forget(self, page: int) -> None:
        del self._uses[page]
        self._ghosts[page] = None
        if len(self._ghosts) > self._capacity - self._small_capacity:
            self._ghosts.popitem(last=False)


class S3FifoTwo(S3Fifo):
    """The variant that promotes a page after two uses."""

    promoted_at = 2


class Lru2(PeerCache):
    """O'Neil et al., "The LRU-K Page Replacement Algorithm", SIGMOD 1993, for K = 2.

    Evicts the page whose second-to-last use is the oldest. It never forgets a use.
    """

    def __init__(self, pages: int) -> None:
        """See `Cache`."""
        super().__init__(pages)
        self._tick = 0
        self._last_two: dict[int, tuple[int, int]] = {}
        self._held: set[int] = set()
        self._heap: list[tuple[tuple[int, int], int]] = []

    def __contains__(self, page: int) -> bool:
        return page in self._held

    def use(self, page: int) -> None:
        """See `PeerCache`."""
        self._tick += 1
        _, last = self._last_two.get(page, (0, 0))
        self._last_two[page] = last, self._tick
        while page not in self._held and len(self._held) >= self._capacity:
            uses, coldest = heapq.heappop(self._heap)
            if self._last_two[coldest] == uses:
                self._held.discard(coldest)
        self._held.add(page)
        heapq.heappush(self._heap, (self._last_two[page], page))


class Belady(PeerCache):
    """Evicts the page whose next use is farthest in the future."""

    def __init__(self, pages: int, requests: Requests) -> None:
        """Serve exactly these requests, which are known in advance."""
        super().__init__(pages)
        self._next: dict[int, deque[int]] = defaultdict(deque)
        ordered = (page for request in requests for page in reversed(request))
        for tick, page in enumerate(ordered):
            self._next[page].append(tick)
        self._held: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def __contains__(self, page: int) -> bool:
        return page in self._held

    def use(self, page: int) -> None:
        """See `PeerCache`."""
        ahead = self._next[page]
        ahead.popleft()
        self._held[page] = ahead[0] if ahead else 1 << 62
        heapq.heappush(self._heap, (-self._held[page], page))
        while len(self._held) > self._capacity:
            farthest, candidate = heapq.heappop(self._heap)
            if self._held.get(candidate) == -farthest:
                del self._held[candidate]


ONLINE: dict[str, type[PeerCache]] = {
    "LRU": Lru,
    "S3-FIFO": S3Fifo,
    "S3-FIFO, two uses": S3FifoTwo,
    "LRU-2": Lru2,
}


def hits_of_peer(
    kind: type[PeerCache], pages: int, requests: Requests, *, both: bool = True
) -> int:
    """Return a peer's hits if leaves are used first; with `both`, those of the better order."""
    orders = (True, False) if both else (True,)
    return max(_hits(kind(pages), requests, leaf_first=order) for order in orders)


def _hits(cache: PeerCache, requests: Requests, *, leaf_first: bool) -> int:
    cache.leaf_first = leaf_first
    return sum(map(cache.request, requests))
