"""Buffers for pages that move between tiers."""

import mmap
from collections.abc import Sequence

from memkv_sglang.page import Page
from memkv_sglang.tiers.base import PendingPage


class Staging:
    """Aligned memory that grows to the largest set of pages so far. Not thread-safe."""

    def __init__(self, size: int) -> None:
        """Allocate `size` bytes. `pages` allocates more if needed."""
        self._grow(size)

    def _grow(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        # Direct I/O into 4 KiB pages is less than half as fast as into huge pages.
        self._memory.madvise(mmap.MADV_HUGEPAGE)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        del self._memory  # the memory is unmapped when its last view is released

    def pages(self, pending: Sequence[PendingPage]) -> list[Page]:
        """Return a page with a buffer for each pending page. They are valid until the next call."""
        starts, end = [], 0
        for page in pending:
            starts.append(end)
            end += -(-page.length // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > len(self._memory):
            self._grow(end)
        view = memoryview(self._memory)
        return [
            Page(page.key, (view[start : start + page.length],))
            for start, page in zip(starts, pending, strict=True)
        ]
