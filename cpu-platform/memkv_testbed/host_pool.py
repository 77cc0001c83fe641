"""A host pool as SGLang makes it: pages in a memfd, which an agent can map as well."""

import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from memkv_sglang.page import Buffer, Chain, Page, PageKey
from memkv_sglang.shared_memory import map_memory, populate
from memkv_sglang.testing.pages import page_content


class HostPool:
    """Pages whose buffers lie apart, as the keys and the values of an MHA pool do.

    First come the first buffers of all pages, then the second ones.
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
        """Take the memory at once; raises `OSError`.

        Args:
            pages: how many.
            page_bytes: bytes of a page, over all its buffers.
            parts: buffers of a page.
            huge: whether to ask for huge pages, which the kernel may not have.
            name: of the memfd, as `/proc/PID/maps` shows it.
            flags: of `memfd_create(2)`.

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
        """Return the buffers of a page as this process maps them."""
        return tuple(self.memory[at : at + self._part] for at in self._places(page))

    def buffers(self, number: int, pages: Iterable[int]) -> list[list[Buffer]]:
        """Return the buffers of pages for an agent that knows the pool by this number."""
        return [[Buffer(number, at, self._part) for at in self._places(page)] for page in pages]

    def place(self, keys: Sequence[PageKey]) -> list[Page]:
        """Return one page for each key, in the pool's first places."""
        return [Page(key, self.views(place)) for place, key in enumerate(keys)]

    def extents(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return where `count` pages that follow one another lie: begin and end of each stretch."""
        return [(at, at + count * self._part) for at in self._places(first)]

    def read(self, page: int) -> bytes:
        """Return a page's bytes."""
        return b"".join(self.views(page))

    def write(self, page: int, content: bytes) -> None:
        """Set a page's bytes."""
        for part, view in enumerate(self.views(page)):
            view[:] = content[part * self._part : (part + 1) * self._part]

    def fill(self, chain: Chain, first: int = 0) -> None:
        """Write what the chain's pages must hold, the first of them to place `first`."""
        for place, key in enumerate(chain.keys(), first):
            self.write(place, page_content(key, self.page_bytes))

    def wrong(self, chain: Chain, first: int = 0) -> list[int]:
        """Return the places of those of the chain's pages that are not there, byte for byte."""
        return [
            place
            for place, key in enumerate(chain.keys(), first)
            if self.read(place) != page_content(key, self.page_bytes)
        ]

    def wipe(self) -> None:
        """Set every byte to zero."""
        self.memory[:] = bytes(self.length)

    def close(self) -> None:
        """Let go of the memory, as the end of the object does; unmapped with the last view."""
        self.memory.release()
        self._close_descriptor()

    def _places(self, page: int) -> list[int]:
        region = self._part * self.pages
        return [region * part + page * self._part for part in range(self._parts)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
