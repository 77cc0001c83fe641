"""Host memory for one chain at a time, like a server's host pool."""

import mmap
import os
from collections.abc import Sequence

from memkv_sglang.client.client import AgentClient
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Buffer, Chain, PageKey
from memkv_sglang.testing.pages import page_content
from memkv_sglang.tiers.base import SpillResult

PARTS = 2
"""Buffers per page. They are in separate regions, like keys and values."""


class ChainMemory:
    """Memory registered with a client's agent. Index `i` has page `i` of the current chain."""

    def __init__(self, client: AgentClient, pages: int, page_bytes: int) -> None:
        """Allocate memory for chains of up to `pages` pages."""
        self.client = client
        self._page_bytes = page_bytes
        self._part = page_bytes // PARTS
        self._region = pages * self._part
        length = self._region * PARTS
        descriptor = os.memfd_create("chain-memory", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, length)
            self._memory = mmap.mmap(descriptor, length)
            self._number = client.register_pool(descriptor, length)
        finally:
            os.close(descriptor)

    def spill(self, chain: Chain) -> list[SpillResult]:
        """Write the chain's content to the memory, then spill it."""
        for i, key in enumerate(chain.keys()):
            content = page_content(key, self._page_bytes)
            for j, at in enumerate(self._places(i)):
                self._memory[at : at + self._part] = content[j * self._part : (j + 1) * self._part]
        return self.client.spill(chain, self._buffers(len(chain.hashes)))

    def load(self, chain: Chain) -> list[PageLoad]:
        """Zero the memory, then load the chain."""
        self._memory[:] = bytes(len(self._memory))
        return self.client.load(chain, self._buffers(len(chain.hashes)))

    def holds(self, place: int, key: PageKey) -> bool:
        """Return whether the page at index `place` has the key's exact content."""
        there = b"".join(self._memory[at : at + self._part] for at in self._places(place))
        return there == page_content(key, self._page_bytes)

    def content(self) -> bytes:
        """Return a copy of the whole memory."""
        return bytes(self._memory)

    def changed_pages(self, before: bytes) -> int:
        """Return how many pages differ from an earlier `content()`."""
        now = self.content()
        return sum(
            any(now[at : at + self._part] != before[at : at + self._part] for at in places)
            for places in map(self._places, range(self._region // self._part))
        )

    def _places(self, index: int) -> list[int]:
        return [self._region * j + index * self._part for j in range(PARTS)]

    def _buffers(self, pages: int) -> Sequence[Sequence[Buffer]]:
        return [
            [Buffer(self._number, at, self._part) for at in self._places(i)] for i in range(pages)
        ]
