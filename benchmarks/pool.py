"""A host pool for measurements, and keys for its pages."""

import ctypes
import os
from pathlib import Path

from memkv_testbed import host_pool

from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace


class HostPool(host_pool.HostPool):
    """A host pool with random content, which contestants verify by checksum."""

    @property
    def address(self) -> int:
        """Address of the pool in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def fill(self) -> None:  # type: ignore[override]  # no chain: faster than what follows from keys
        """Fill every page with different content."""
        for page in range(self.pages):
            for part in self.views(page):
                part[:] = os.urandom(len(part))

    def index(self, page: Page) -> int:
        """Return the index of a page in this pool."""
        first = ctypes.addressof(ctypes.c_char.from_buffer(page.buffers[0]))
        return (first - self.address) // len(page.buffers[0])

    def huge_share(self) -> float:
        """Return the fraction of the mapping that is in huge pages (smaps)."""
        return huge_bytes(self.address, self.length) / self.length


def huge_bytes(address: int, length: int) -> int:
    """Return how many bytes of this process's shared mapping are in huge pages (smaps)."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:
            begin, _, end = first.partition("-")
            inside = int(begin, 16) < address + length and address < int(end, 16)
        elif inside and line.startswith("ShmemPmdMapped:"):
            found += int(line.split()[1]) << 10
    return found


def keys(count: int, page_bytes: int, seed: str) -> list[PageKey]:
    """Return the keys of a chain of pages of this size."""
    return make_chain(make_namespace(page_bytes=page_bytes), count, seed).keys()
