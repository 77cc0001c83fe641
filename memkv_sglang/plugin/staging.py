"""Copy pages through shared memory if a host pool is not in shared memory itself.

That is so if the storage was attached to a server that had started without it. It costs one copy
per page.
"""

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

from memkv_sglang.client.client import AgentClient
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.engine.served import ServedRequest
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.plugin.pools import PAGES_PER_CALL, HostPool, Pieces, Pool, UnsuitablePoolError
from memkv_sglang.tiers.base import LoadResult, SpillResult

STAGING_BYTES = 256 << 20
"""Bytes of the staging memory: half for loads, half for spills. Memory is allocated when it is
used."""

ALIGNMENT = 4096
"""Alignment in bytes, as direct I/O requires."""


class Area:
    """Memory for the pages of one call. Only one call uses it at a time."""

    def __init__(self, pool: int, offset: int, address: int, size: int) -> None:
        """Use `size` bytes at `address`, which are at `offset` in the agent's pool `pool`."""
        self.lock = threading.Lock()
        self.address = address
        self.size = size
        self._pool = pool
        self._offset = offset

    def buffers(self, pages: int, page_bytes: int) -> list[list[Buffer]]:
        """Return the buffer of each page."""
        step = aligned(page_bytes)
        return [[Buffer(self._pool, self._offset + i * step, page_bytes)] for i in range(pages)]


class Staging:
    """Shared memory that all pools of a server use."""

    def __init__(self, client: AgentClient, size: int = STAGING_BYTES) -> None:
        """Register `size` bytes with the agent. Raises `OSError`."""
        descriptor = os.memfd_create("memkv-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            self._memory = mmap.mmap(descriptor, size)
            number = client.register_pool(descriptor, size)
        finally:
            os.close(descriptor)
        start, half = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)), size // 2
        self.loads = Area(number, 0, start, half)
        self.spills = Area(number, half, start + half, half)


class StagedPool(Pool):
    """A host pool whose pages are copied to and from the staging memory."""

    def __init__(self, host_pool: HostPool, client: AgentClient, staging: Staging) -> None:
        """Raise `UnsuitablePoolError` if a page does not fit in the staging memory."""
        super().__init__(host_pool, client)
        self._staging = staging
        fitting = staging.loads.size // aligned(self.page_bytes)
        if not fitting:
            raise UnsuitablePoolError(
                f"pages of {self.page_bytes} bytes do not fit into the staging memory of "
                f"{staging.loads.size} bytes; start the server with --enable-memkv"
            )
        self.pages_per_call = min(PAGES_PER_CALL, fitting)

    def _load(self, chain: Chain, indices: Any, served: ServedRequest) -> list[PageLoad]:
        pieces, area = self.pieces(indices), self._staging.loads
        with area.lock:
            if self._client.withholding:  # the withheld buffers may be in this memory
                return [PageLoad(LoadResult.FAILED)] * len(chain.hashes)
            buffers = area.buffers(len(chain.hashes), self.page_bytes)
            loads = self._client.load(chain, buffers, served)
            for page, load in enumerate(loads):
                if load.result is LoadResult.LOADED:
                    self._copy(area, page, pieces, into_area=False)
        return loads

    def _spill(self, chain: Chain, indices: Any, prefix: Sequence[bytes]) -> list[SpillResult]:
        pieces, area = self.pieces(indices), self._staging.spills
        with area.lock:
            for page in range(len(chain.hashes)):
                self._copy(area, page, pieces, into_area=True)
            buffers = area.buffers(len(chain.hashes), self.page_bytes)
            return self._client.spill(chain, buffers, prefix)

    def _copy(self, area: Area, page: int, pieces: Pieces, *, into_area: bool) -> None:
        place = area.address + page * aligned(self.page_bytes)
        addresses, lengths = pieces.addresses[page].tolist(), pieces.lengths[page].tolist()
        for address, length in zip(addresses, lengths, strict=True):
            source, target = (address, place) if into_area else (place, address)
            ctypes.memmove(target, source, length)  # copying releases the GIL
            place += length


def aligned(size: int) -> int:
    """Return `size` rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT
