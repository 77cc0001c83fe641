"""Move pages between SGLang's host pools and the agent."""

import ctypes
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from memkv_sglang.client.client import AgentClient
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.engine.served import UNKNOWN_REQUEST, ServedRequest
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.tiers.base import LoadResult, SpillResult

PAGES_PER_CALL = 128
"""Pages per call to the agent. SGLang loads and backs up as many at once."""

START_SECONDS = 1.5
"""Seconds during which a storage call may start calls to the agent. Each of those ends within 8 s,
and SGLang waits 10 s for its storage threads."""


log = logging.getLogger(__name__)


class UnsuitablePoolError(Exception):
    """The agent cannot move pages of this host pool. The message says why and what to do."""


class HostPool(Protocol):
    """The parts of SGLang's `HostKVCache` (`mem_cache/pool_host/base.py`) that this module uses."""

    page_size: int
    size_per_token: int
    allocator: Any

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], Any]:
        """Return the address and the length of every buffer of the pages at `indices`."""

    def get_dummy_flat_data_page(self) -> Any:
        """Return a tensor as large as a page."""


class Pieces(NamedTuple):
    """Addresses and lengths of page buffers. Each row has a page's buffers, in stored order."""

    addresses: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def start_deadline() -> float:
    """Return the time by which a storage call that begins now must start its last agent call."""
    return time.monotonic() + START_SECONDS


def is_logical(host_pool: Any) -> bool:
    """Return whether a pool has no memory of its own because other pools hold its data."""
    return getattr(host_pool, "kv_buffer", host_pool) is None


class Pool(ABC):
    """Moves pages of one host pool. `indices` are the CPU token slots of whole pages.

    Calls last at most 10 s. The agent no longer accesses the pages when they return, unless they
    are withheld (`client/withheld.py`).
    """

    pages_per_call = PAGES_PER_CALL

    def __init__(self, host_pool: HostPool, client: AgentClient) -> None:
        """Ask SGLang for the size of a page. Raises `UnsuitablePoolError`."""
        self.host_pool = host_pool
        self.page_tokens = int(getattr(host_pool, "logical_page_size", 0) or host_pool.page_size)
        """Number of `indices` per page."""
        self.page_bytes = _page_bytes(host_pool, self.page_tokens)
        self._client = client

    def load(
        self, chain: Chain, indices: Any, until: float, served: ServedRequest = UNKNOWN_REQUEST
    ) -> list[PageLoad]:
        """Load one page per hash, in agent calls that start before `until`. See `Engine.load`."""
        loads: list[PageLoad] = []
        for part, slots in self._parts(chain, indices, until):
            loads += self._load(part, slots, served)
            if loads[-1].result is not LoadResult.LOADED:
                break
        return loads + [PageLoad(LoadResult.SKIPPED)] * (len(chain.hashes) - len(loads))

    def spill(
        self, chain: Chain, indices: Any, prefix: Sequence[bytes], until: float
    ) -> list[SpillResult]:
        """Spill one page per hash, in agent calls that start before `until`. See `Engine.spill`."""
        results: list[SpillResult] = []
        for part, slots in self._parts(chain, indices, until):
            results += self._spill_once_there_is_an_agent(part, slots, prefix, until)
            if results[-1] > SpillResult.PRESENT:
                break
            prefix = [*prefix, *part.hashes]
        return results + [SpillResult.REFUSED] * (len(chain.hashes) - len(results))

    def _spill_once_there_is_an_agent(
        self, chain: Chain, indices: Any, prefix: Sequence[bytes], until: float
    ) -> list[SpillResult]:
        """Spill. Retries if there was no agent, because SGLang never offers refused pages again."""
        results = self._spill(chain, indices, prefix)
        while (
            set(results) == {SpillResult.REFUSED}
            and self._client.problem
            and time.monotonic() < until
        ):
            if not self._client.wait(max(0.0, until - time.monotonic())):
                break
            results = self._spill(chain, indices, prefix)
        return results

    def _parts(self, chain: Chain, indices: Any, until: float) -> Iterator[tuple[Chain, Any]]:
        pages = len(chain.hashes)
        if len(indices) != pages * self.page_tokens:
            log.warning(
                "memkv: SGLang passed %d slots for %d pages; treated as a miss", len(indices), pages
            )
            return
        for begin in range(0, pages, self.pages_per_call):
            end = min(begin + self.pages_per_call, pages)
            if time.monotonic() > until:
                return
            slots = indices[begin * self.page_tokens : end * self.page_tokens]
            yield Chain(chain.namespace, chain.hashes[begin:end]), slots

    def pieces(self, indices: Any) -> Pieces:
        """Return the buffers of the pages at `indices`. Raises `UnsuitablePoolError`."""
        found = _pieces(self.host_pool, indices, len(indices) // self.page_tokens)
        if (found.lengths.sum(axis=1) != self.page_bytes).any():
            raise UnsuitablePoolError(
                f"SGLang names buffers of pages that are not {self.page_bytes} bytes"
            )
        return found

    @abstractmethod
    def _load(self, chain: Chain, indices: Any, served: ServedRequest) -> list[PageLoad]: ...

    @abstractmethod
    def _spill(self, chain: Chain, indices: Any, prefix: Sequence[bytes]) -> list[SpillResult]: ...


class _Mapping(NamedTuple):
    start: int
    end: int
    pool: int


class SharedPool(Pool):
    """A host pool that the agent has mapped, so that pages move without a copy."""

    def __init__(self, host_pool: HostPool, client: AgentClient) -> None:
        """Register the pool's memory with the agent. Raises `UnsuitablePoolError`."""
        super().__init__(host_pool, client)
        mappings = sorted(_mappings(host_pool, client))
        self._starts, self._ends, self._numbers = np.array(mappings, dtype=np.int64).T

    def buffers(self, indices: Any) -> list[list[Buffer]]:
        """Return the buffers of each page. Raises `UnsuitablePoolError`."""
        addresses, lengths = self.pieces(indices)
        each = addresses.shape[1]
        starts, sizes = addresses.ravel(), lengths.ravel()
        at = np.searchsorted(self._starts, starts, side="right") - 1
        if (at < 0).any() or (starts + sizes > self._ends[at]).any():
            raise UnsuitablePoolError("a page lies outside the pool's shared memory")
        numbers, offsets = self._numbers[at], starts - self._starts[at]
        columns = numbers.tolist(), offsets.tolist(), sizes.tolist()
        located = list(map(Buffer._make, zip(*columns, strict=True)))
        return [located[i : i + each] for i in range(0, len(located), each)]

    def _load(self, chain: Chain, indices: Any, served: ServedRequest) -> list[PageLoad]:
        return self._client.load(chain, self.buffers(indices), served)

    def _spill(self, chain: Chain, indices: Any, prefix: Sequence[bytes]) -> list[SpillResult]:
        return self._client.spill(chain, self.buffers(indices), prefix)


def is_shared(host_pool: HostPool) -> bool:
    """Return whether the pool is in shared memory whose descriptors are known."""
    return bool(getattr(host_pool.allocator, "fds", None))


def _mappings(host_pool: HostPool, client: AgentClient) -> Iterator[_Mapping]:
    allocator = host_pool.allocator
    for descriptor, memory in zip(allocator.fds, allocator.mms, strict=True):
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        number = client.register_pool(descriptor, len(memory))
        yield _Mapping(start, start + len(memory), number)


def _pieces(host_pool: HostPool, indices: Any, pages: int) -> Pieces:
    addresses, lengths = host_pool.get_page_buffer_meta(indices)
    count = len(addresses)
    sizes = list(repeat(lengths, count)) if isinstance(lengths, int) else lengths
    if not pages or not count or count % pages or len(sizes) != count:
        raise UnsuitablePoolError(f"SGLang names {count} buffers for {pages} pages")
    shape = (pages, count // pages)
    return Pieces(
        np.array(addresses, dtype=np.int64).reshape(shape),
        np.array(sizes, dtype=np.int64).reshape(shape),
    )


def _page_bytes(host_pool: HostPool, page_tokens: int) -> int:
    """Return the size of a page, computed from the buffers that SGLang names for one page.

    Raises `UnsuitablePoolError` if SGLang states another size elsewhere, because a part of the page
    could be in other buffers.
    """
    import torch

    try:
        named = int(_pieces(host_pool, torch.arange(page_tokens), 1).lengths.sum())
    except (ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise UnsuitablePoolError(
            f"{type(host_pool).__name__} does not name the buffers of its pages: {error!r}"
        ) from error
    if named != host_pool.size_per_token * host_pool.page_size and named != _flat(host_pool):
        raise UnsuitablePoolError(
            f"{type(host_pool).__name__} names {named} bytes per page, but has "
            f"{host_pool.size_per_token} per token and {host_pool.page_size} tokens per page"
        )
    return named


def _flat(host_pool: HostPool) -> int:
    with suppress(NotImplementedError, AttributeError):
        return int(host_pool.get_dummy_flat_data_page().nbytes)
    return -1
