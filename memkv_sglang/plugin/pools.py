"""SGLang's host pools as the agent sees them: shared memory, and where a page lies in it."""

import bisect
import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from memkv_sglang.client.client import AgentClient
from memkv_sglang.page import Buffer


class UnsuitablePoolError(Exception):
    """A host pool whose pages the agent cannot reach. The text says why and what to do."""


class HostPool(Protocol):
    """What this module uses of SGLang's `HostKVCache` (`mem_cache/pool_host/base.py`)."""

    page_size: int
    size_per_token: int
    allocator: Any

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], Any]:
        """Return the address and the length of every buffer of the pages at `indices`."""


class _Mapping(NamedTuple):
    start: int
    end: int
    pool: int


class SharedPool:
    """A host pool whose memory the agent has mapped."""

    def __init__(self, host_pool: HostPool, client: AgentClient) -> None:
        """Register every memory file of the pool. Raises `UnsuitablePoolError`."""
        self.host_pool = host_pool
        self.page_bytes = host_pool.size_per_token * host_pool.page_size
        self._client = client
        self._mappings = sorted(_mappings(host_pool, client))
        self._starts = [mapping.start for mapping in self._mappings]

    def buffers(self, indices: Any, pages: int) -> list[list[Buffer]]:
        """Return the buffers of each of `pages` pages. `indices` are token slots in the pool.

        Raises `UnsuitablePoolError` if a page is not wholly in shared memory.
        """
        addresses, lengths = self.host_pool.get_page_buffer_meta(indices)
        if isinstance(lengths, int):
            lengths = [lengths] * len(addresses)
        each = len(addresses) // pages
        located = [self._locate(a, n) for a, n in zip(addresses, lengths, strict=True)]
        split = [located[i : i + each] for i in range(0, len(located), each)]
        if len(split) != pages or any(map(self._is_short, split)):
            raise UnsuitablePoolError(
                f"pages of {self.page_bytes} bytes expected, SGLang names other buffers"
            )
        return split

    def _is_short(self, buffers: Sequence[Buffer]) -> bool:
        return sum(buffer.length for buffer in buffers) != self.page_bytes

    def _locate(self, address: int, length: int) -> Buffer:
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0 or address + length > self._mappings[at].end:
            raise UnsuitablePoolError("a page lies outside the pool's shared memory")
        mapping = self._mappings[at]
        return Buffer(mapping.pool, address - mapping.start, length)

    def close(self) -> None:
        """Let the agent forget the pool."""
        for mapping in self._mappings:
            self._client.release_pool(mapping.pool)


def _mappings(host_pool: HostPool, client: AgentClient) -> list[_Mapping]:
    allocator = host_pool.allocator
    descriptors = getattr(allocator, "fds", None)
    if not descriptors:
        raise UnsuitablePoolError(
            "the host pool is not in shared memory; start the server with --enable-memkv, or give "
            'it "allocator": "shm" in --hicache-storage-backend-extra-config'
        )
    found = []
    for descriptor, memory in zip(descriptors, allocator.mms, strict=True):
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        number = client.register_pool(descriptor, len(memory))
        found.append(_Mapping(start, start + len(memory), number))
    return found
