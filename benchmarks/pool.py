"""A host pool as SGLang makes it: a memfd, mapped and populated."""

import mmap
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from memkv_sglang.page import Page, PageKey
from memkv_sglang.shared_memory import map_memory, populate
from memkv_sglang.testing.pages import make_chain, make_namespace

BUFFERS = 2
"""A page of an MHA pool has its keys and its values apart."""


class HostPool:
    """`pages` pages of `page_bytes`; the first halves of all pages lie before the second ones."""

    def __init__(self, pages: int, page_bytes: int, *, huge: bool = False) -> None:
        """Take the memory at once. `huge` asks for huge pages, which the kernel may not have."""
        self.pages = pages
        self.page_bytes = page_bytes
        descriptor = os.memfd_create("benchmark-pool", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, pages * page_bytes)
            self._view = map_memory(descriptor, pages * page_bytes)
        finally:
            os.close(descriptor)
        if huge:
            populate(self._view)
        for offset in range(0, len(self._view), mmap.PAGESIZE):
            self._view[offset] = 1

    def fill(self) -> None:
        """Give every page content of its own."""
        for i in range(self.pages):
            for part in self.buffers(i):
                part[:] = os.urandom(len(part))

    def buffers(self, index: int) -> tuple[memoryview, ...]:
        """Return the buffers of the page at `index`."""
        part = self.page_bytes // BUFFERS
        half = self.pages * part
        starts = [half * i + index * part for i in range(BUFFERS)]
        return tuple(self._view[start : start + part] for start in starts)

    def place(self, keys: Sequence[PageKey]) -> list[Page]:
        """Return one page for each key, in the pool's first slots."""
        return [Page(key, self.buffers(i)) for i, key in enumerate(keys)]

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the memory; it is unmapped with the last page's view."""
        self._view.release()


def keys(count: int, page_bytes: int, seed: str) -> list[PageKey]:
    """Return the keys of a chain of pages of this size."""
    return make_chain(make_namespace(page_bytes=page_bytes), count, seed).keys()
