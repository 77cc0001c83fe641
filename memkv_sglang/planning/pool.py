"""Simulate an LRU pool of runs of pages: SGLang's device and host pools, and the bucket."""

from collections import OrderedDict
from collections.abc import Sequence


class LruPool:
    """Holds chains, and evicts the least recently used pages, leaves before roots.

    Chains have the same form as in `SimulatedDisk`.
    """

    def __init__(self, pages: float, run: int = 1) -> None:
        """Create an empty pool that holds `pages` pages, which may be infinite."""
        self._capacity = pages
        self._run = run
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self.held = 0
        """Pages held."""

    def __contains__(self, run: int) -> bool:
        return run in self._sizes

    def clear(self) -> None:
        """Remove everything."""
        self._sizes.clear()
        self.held = 0

    def size(self, run: int) -> int:
        """Return how many pages of a run are stored, without recording a use."""
        return self._sizes.get(run, 0)

    def lookup(self, runs: Sequence[int], pages: int) -> int:
        """Return the length of the stored prefix in pages, without recording a use."""
        sizes, full = self._sizes, self._run
        for i, run in enumerate(runs):
            size = sizes.get(run)
            if size is None:
                return i * full
            if size < full:
                return min(i * full + size, pages)
        return pages

    def store(self, runs: Sequence[int], pages: int) -> int:
        """Record a use of a chain and add its missing pages; return how many were added.

        A chain larger than the pool is truncated.
        """
        if pages > self._capacity:
            pages = int(self._capacity)
        count = -(-pages // self._run)
        sizes, before = self._sizes, self.held
        # The root is the last, so that it is the most recently used.
        for i in range(count - 1, -1, -1):
            run = runs[i]
            size = self._run if i < count - 1 else pages - self._run * (count - 1)
            old = sizes.get(run, 0)
            if size > old:
                sizes[run] = size
                self.held += size - old
            sizes.move_to_end(run)
        added = self.held - before
        while self.held > self._capacity:
            self.held -= sizes.popitem(last=False)[1]
        return added
