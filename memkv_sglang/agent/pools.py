"""Map clients' host memory pools into the agent, and check requests against them."""

import fcntl
import os
import stat
import threading
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, Buffer, Page, PageKey
from memkv_sglang.shared_memory import is_ordinary_memory, map_memory

MAX_POOLS = 1024
"""Maximum pools of one process. A server registers a handful."""

MEMORY_MULTIPLE = 2
"""Maximum bytes of one process's pools, as a multiple of the node's memory. More than 1, because
the pools of an ending session may briefly coexist with those of the next."""

ALL_PROCESSES_MULTIPLE = 4
"""Limit of all processes together, as a multiple of one process's limit."""

_OFFSET_BITS = 56
"""Width of an offset in the addresses that `_bases` forms; no pool is large enough to need more."""


class RequestError(Exception):
    """The request is invalid and had no effect. The message is sent to the client."""


class PoolBudget:
    """Limits what all sessions together may map. Thread-safe.

    A client can share a huge sparse file at no cost, but mapping it uses the agent's address space.
    A pool counts until it is unmapped, possibly after its session has ended.
    """

    def __init__(self) -> None:
        """Derive the limit from the node's memory size."""
        self.limit = MEMORY_MULTIPLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._lock = threading.Lock()
        # Size and process of each mapping, for as long as it exists.
        self._mapped: weakref.WeakKeyDictionary[object, tuple[int, int]]
        self._mapped = weakref.WeakKeyDictionary()

    def map(self, descriptor: int, length: int, pid: int) -> memoryview:
        """Map memory for process `pid`. Raises `RequestError` over a limit, or as `map_memory`."""
        with self._lock:
            mapped = list(self._mapped.values())
            own = [size for size, owner in mapped if owner == pid]
            _check_limit("this process", own, length, self.limit, MAX_POOLS)
            sizes = [size for size, _ in mapped]
            _check_limit(
                "all processes together",
                sizes,
                length,
                ALL_PROCESSES_MULTIPLE * self.limit,
                ALL_PROCESSES_MULTIPLE * MAX_POOLS,
            )
            view = map_memory(descriptor, length)
            self._mapped[view.obj] = length, pid
        return view


def _check_limit(whose: str, sizes: list[int], length: int, limit: int, count: int) -> None:
    if len(sizes) >= count:
        raise RequestError(f"{whose} may have at most {count} pools")
    if sum(sizes) + length > limit:
        raise RequestError(
            f"a pool of {length} bytes is too large: {whose} may map {limit} bytes, and "
            f"{sum(sizes)} are mapped"
        )


class Pools:
    """The pools of one session, keyed by the client's numbers. Thread-safe.

    Pages keep their memory mapped: a pool that is released, or whose client has gone, is unmapped
    when the last call that uses it ends.
    """

    def __init__(self, budget: PoolBudget, pid: int) -> None:
        """Start without pools. Pools that process `pid` registers count toward the budget."""
        self._budget = budget
        self.pid = pid
        self._views: dict[int, memoryview] = {}
        self._memories: dict[int, tuple[int, int]] = {}
        """Device and inode of each pool's memory, because two pools may share memory."""

    def __len__(self) -> int:
        return len(self._views)

    @property
    def size(self) -> int:
        """Mapped bytes."""
        return sum(len(view) for view in list(self._views.values()))

    def register(self, pool: int, length: int, descriptor: int) -> None:
        """Map `length` bytes of the descriptor, which the caller closes. Raises `RequestError`."""
        if pool in self._views:
            raise RequestError(f"pool {pool} is already registered")
        check_descriptor(descriptor, length)
        try:
            view = self._budget.map(descriptor, length, self.pid)
        except (OSError, ValueError, OverflowError) as error:
            raise RequestError(f"pool {pool} cannot be mapped: {error}") from None
        # another connection registered the number first
        if self._views.setdefault(pool, view) is not view:
            raise RequestError(f"pool {pool} is already registered")
        status = os.fstat(descriptor)
        self._memories[pool] = status.st_dev, status.st_ino

    def release(self, pool: int) -> None:
        """Remove a pool. Raises `RequestError`."""
        self._memories.pop(pool, None)
        if self._views.pop(pool, None) is None:
            raise RequestError(f"unknown pool {pool}")

    def pages(
        self, namespace: bytes, hashes: bytes, buffers: Sequence[Sequence[Buffer]]
    ) -> list[Page]:
        """Return a request's pages, whose buffers are views of the pools. Raises `RequestError`."""
        split = split_hashes(namespace, hashes)
        if len(split) != len(buffers):
            raise RequestError(f"{len(split)} hashes, but buffers for {len(buffers)} pages")
        return [
            Page(PageKey(namespace, page_hash), tuple(map(self._view, page_buffers)))
            for page_hash, page_buffers in zip(split, buffers, strict=True)
        ]

    def check_disjoint(self, buffers: Sequence[Sequence[Buffer]]) -> None:
        """Check that no two buffers overlap. Raises `RequestError`."""
        flat = list(chain.from_iterable(buffers))
        bases = self._bases({pool for pool, _, _ in flat})
        begins = [bases[pool] + offset for pool, offset, _ in flat]
        ends = [begin + length for begin, (_, _, length) in zip(begins, flat, strict=True)]
        # Sort begins and ends separately, which is faster than sorting pairs. The buffers are
        # disjoint if and only if each begin, except the first, is at least as large as the end
        # before it.
        begins.sort()
        ends.sort()
        for begin, end in zip(begins[1:], ends, strict=False):
            if begin < end:
                offset = begin % (1 << _OFFSET_BITS)
                raise RequestError(
                    f"two buffers of a request overlap at offset {offset} of a pool; give each "
                    "page its own memory"
                )

    def _bases(self, pools: Iterable[int]) -> dict[int, int]:
        """Return each pool's base in one address space. Pools of the same memory share a base."""
        numbers: dict[object, int] = {}
        bases: dict[int, int] = {}
        for pool in pools:
            memory = self._memories.get(pool)
            if memory is None:  # released by a concurrent call
                raise RequestError(f"unknown pool {pool}")
            bases[pool] = numbers.setdefault(memory, len(numbers)) << _OFFSET_BITS
        return bases

    def _view(self, buffer: Buffer) -> memoryview:
        pool, offset, length = buffer
        view = self._views.get(pool)
        if view is None:
            raise RequestError(f"unknown pool {pool}")
        if offset < 0 or length <= 0 or offset + length > len(view):
            raise RequestError(
                f"bytes {offset} to {offset + length} are outside pool {pool} of {len(view)} bytes"
            )
        return view[offset : offset + length]


def split_hashes(namespace: bytes, hashes: bytes) -> list[bytes]:
    """Split concatenated hashes. Raises `RequestError`."""
    if len(namespace) != NAMESPACE_DIGEST_SIZE:
        raise RequestError(
            f"a namespace digest has {NAMESPACE_DIGEST_SIZE} bytes, got {len(namespace)}"
        )
    if len(hashes) % PAGE_HASH_SIZE:
        raise RequestError(
            f"page hashes have {PAGE_HASH_SIZE} bytes each, got {len(hashes)} bytes in total"
        )
    return [hashes[i : i + PAGE_HASH_SIZE] for i in range(0, len(hashes), PAGE_HASH_SIZE)]


def check_descriptor(descriptor: int, length: int) -> None:
    """Check that `length` bytes can be mapped safely, and seal the memory. Raises `RequestError`.

    Accessing a mapping beyond the end of its file would kill the agent with SIGBUS. So the memory
    is sealed against shrinking before its size is read.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise RequestError("the descriptor is not a memory file; create one with memfd_create")
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise RequestError("the descriptor is not open for reading and writing")
    try:
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        raise RequestError(
            "the memory cannot be sealed against shrinking; create it with memfd_create and "
            "MFD_ALLOW_SEALING"
        ) from None
    if not is_ordinary_memory(descriptor):
        # With MFD_HUGETLB, accessing a punched hole raises SIGBUS if no huge page is free.
        raise RequestError("the memory is not ordinary memory; create it without MFD_HUGETLB")
    size = os.fstat(descriptor).st_size
    if not 0 < length <= size:
        raise RequestError(f"a pool of {length} bytes does not fit in a file of {size} bytes")
