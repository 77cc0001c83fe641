"""Memory for pages on their way from one tier to another."""

import mmap
from collections.abc import Sequence

from memkv_sglang.page import Page
from memkv_sglang.tiers.base import PendingPage


class Staging:
    """Page-aligned memory, as large as the largest set of pages so far. For one thread."""

    def __init__(self, size: int) -> None:
        """Take `size` bytes, more when pages need it."""
        self._grow(size)

    def _grow(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        # Direct I/O into 4 KiB pages reaches less than half of the speed into huge pages.
        self._memory.madvise(mmap.MADV_HUGEPAGE)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        del self._memory  # unmapped once no view is left

    def pages(self, pending: Sequence[PendingPage]) -> list[Page]:
        """Return a page with memory for each; valid until the next call."""
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
