"""A host pool like SGLang's: pages in a memfd that an agent can map."""

import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Self

from memkv_sglang.page import Buffer, Chain, Page, PageKey
from memkv_sglang.shared_memory import map_memory, populate
from memkv_sglang.testing.pages import page_content


class HostPool:
    """Pages with separate buffers, like the keys and values of an MHA pool.

    The first buffers of all pages come first, then all second buffers, and so on.
    """

    def __init__(
        self,
        pages: int,
        page_bytes: int,
        *,
        parts: int = 2,
        huge: bool = False,
        name: str = "pool",
        flags: int = os.MFD_ALLOW_SEALING,
    ) -> None:
        """Allocate the memory. Raises `OSError`.

        Args:
            pages: number of pages.
            page_bytes: bytes of a page, in all its buffers.
            parts: number of buffers of a page.
            huge: whether to request huge pages; the kernel may not have any.
            name: name of the memfd, which `/proc/PID/maps` shows.
            flags: flags for `memfd_create(2)`.

        """
        self.pages = pages
        self.page_bytes = page_bytes
        self.length = pages * page_bytes
        """Bytes."""
        self.descriptor = os.memfd_create(name, flags | os.MFD_CLOEXEC)
        self._close_descriptor = weakref.finalize(self, os.close, self.descriptor)
        self._part = page_bytes // parts
        self._parts = parts
        os.ftruncate(self.descriptor, self.length)
        self.memory = map_memory(self.descriptor, self.length)
        if huge:
            populate(self.memory)
        for offset in range(0, self.length, mmap.PAGESIZE):
            self.memory[offset] = 0

    def views(self, page: int) -> tuple[memoryview, ...]:
        """Return the buffers of a page, as this process has mapped them."""
        return tuple(self.memory[at : at + self._part] for at in self._places(page))

    def buffers(self, number: int, pages: Iterable[int]) -> list[list[Buffer]]:
        """Return the buffers of pages, for an agent that knows the pool by this number."""
        return [[Buffer(number, at, self._part) for at in self._places(page)] for page in pages]

    def place(self, keys: Sequence[PageKey]) -> list[Page]:
        """Return one page per key, at the pool's first indices."""
        return [Page(key, self.views(place)) for place, key in enumerate(keys)]

    def extents(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return begin and end of each region that `count` consecutive pages occupy."""
        return [(at, at + count * self._part) for at in self._places(first)]

    def read(self, page: int) -> bytes:
        """Return a page's bytes."""
        return b"".join(self.views(page))

    def write(self, page: int, content: bytes) -> None:
        """Set a page's bytes."""
        for part, view in enumerate(self.views(page)):
            view[:] = content[part * self._part : (part + 1) * self._part]

    def fill(self, chain: Chain, first: int = 0) -> None:
        """Write the content of the chain's pages, starting at index `first`."""
        for place, key in enumerate(chain.keys(), first):
            self.write(place, page_content(key, self.page_bytes))

    def wrong(self, chain: Chain, first: int = 0) -> list[int]:
        """Return the indices of the chain's pages that do not have their exact content."""
        return [
            place
            for place, key in enumerate(chain.keys(), first)
            if self.read(place) != page_content(key, self.page_bytes)
        ]

    def wipe(self) -> None:
        """Set every byte to zero."""
        self.memory[:] = bytes(self.length)

    def close(self) -> None:
        """Release the memory. It is unmapped with its last view."""
        self.memory.release()
        self._close_descriptor()

    def _places(self, page: int) -> list[int]:
        region = self._part * self.pages
        return [region * part + page * self._part for part in range(self._parts)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
