"""Host pools of clients, mapped into the agent."""

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
"""Pools of one process; a server registers a handful."""

MEMORY_MULTIPLE = 2
"""Bytes of one process's pools as a multiple of the node's memory: pools hold real pages, and those
of a session that ends may be there for a moment beside those of the next."""

SHARES = 4
"""All processes together may have as many times what one may have."""


_OFFSET_BITS = 56
"""More than the bits of any offset into a pool."""


class RequestError(Exception):
    """A request that cannot be carried out; nothing was touched. The text goes to the client."""


class PoolBudget:
    """What is mapped for all sessions: sparse memory costs its maker nothing, but here addresses.

    A pool counts until it is unmapped, which may be after its session's end. Thread-safe.
    """

    def __init__(self) -> None:
        """Allow a multiple of the memory that the node has."""
        self.limit = MEMORY_MULTIPLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._lock = threading.Lock()
        # Bytes and process of each mapping, as long as that is there.
        self._mapped: weakref.WeakKeyDictionary[object, tuple[int, int]]
        self._mapped = weakref.WeakKeyDictionary()

    def map(self, descriptor: int, length: int, pid: int) -> memoryview:
        """Map memory for a process. Raises `RequestError` beyond a limit, else as `map_memory`."""
        with self._lock:
            mapped = list(self._mapped.values())
            own = [size for size, owner in mapped if owner == pid]
            _check_room("this process", own, length, self.limit, MAX_POOLS)
            sizes = [size for size, _ in mapped]
            _check_room(
                "all processes together", sizes, length, SHARES * self.limit, SHARES * MAX_POOLS
            )
            view = map_memory(descriptor, length)
            self._mapped[view.obj] = length, pid
        return view


def _check_room(whose: str, sizes: list[int], length: int, limit: int, count: int) -> None:
    if len(sizes) >= count:
        raise RequestError(f"{whose} may have {count} pools")
    if sum(sizes) + length > limit:
        raise RequestError(
            f"a pool of {length} bytes beside {sum(sizes)} mapped ones: those of {whose} may be "
            f"{limit} bytes"
        )


class Pools:
    """The pools of one session, by the client's numbers. Thread-safe.

    Pages hold on to the memory that they lie in: a pool that is released, or whose client is gone,
    is unmapped when the last call that uses it has ended.
    """

    def __init__(self, budget: PoolBudget, pid: int) -> None:
        """Start without any; what the process `pid` registers counts in the budget."""
        self._budget = budget
        self._pid = pid
        self._views: dict[int, memoryview] = {}
        self._memories: dict[int, tuple[int, int]] = {}
        """By pool, the device and inode of its memory: two pools may be of one memory."""

    def __len__(self) -> int:
        return len(self._views)

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return sum(len(view) for view in list(self._views.values()))

    def register(self, pool: int, length: int, descriptor: int) -> None:
        """Map `length` bytes of the descriptor, which the caller closes. Raises `RequestError`."""
        if pool in self._views:
            raise RequestError(f"pool {pool} is registered already")
        check_descriptor(descriptor, length)
        try:
            view = self._budget.map(descriptor, length, self._pid)
        except (OSError, ValueError, OverflowError) as error:
            raise RequestError(f"pool {pool} cannot be mapped: {error}") from None
        if self._views.setdefault(pool, view) is not view:  # another connection was quicker
            raise RequestError(f"pool {pool} is registered already")
        status = os.fstat(descriptor)
        self._memories[pool] = status.st_dev, status.st_ino

    def release(self, pool: int) -> None:
        """Forget a pool. Raises `RequestError`."""
        self._memories.pop(pool, None)
        if self._views.pop(pool, None) is None:
            raise RequestError(f"there is no pool {pool}")

    def pages(
        self, namespace: bytes, hashes: bytes, buffers: Sequence[Sequence[Buffer]]
    ) -> list[Page]:
        """Return the pages of a request over the memory of the pools. Raises `RequestError`."""
        split = split_hashes(namespace, hashes)
        if len(split) != len(buffers):
            raise RequestError(f"{len(split)} hashes with buffers of {len(buffers)} pages")
        return [
            Page(PageKey(namespace, page_hash), tuple(map(self._view, page_buffers)))
            for page_hash, page_buffers in zip(split, buffers, strict=True)
        ]

    def check_disjoint(self, buffers: Sequence[Sequence[Buffer]]) -> None:
        """Check that no two of these buffers, which are in pools, share memory.

        Raises `RequestError`.
        """
        flat = list(chain.from_iterable(buffers))
        bases = self._bases({pool for pool, _, _ in flat})
        begins = [bases[pool] + offset for pool, offset, _ in flat]
        ends = [begin + length for begin, (_, _, length) in zip(begins, flat, strict=True)]
        # Sorted apart, which is faster than sorting pairs: buffers are disjoint if and only if each
        # begin, from the second on, is no smaller than the end before it.
        begins.sort()
        ends.sort()
        for begin, end in zip(begins[1:], ends, strict=False):
            if begin < end:
                offset = begin % (1 << _OFFSET_BITS)
                raise RequestError(
                    f"two buffers of a request overlap at offset {offset} of a pool; give each "
                    "page memory of its own"
                )

    def _bases(self, pools: Iterable[int]) -> dict[int, int]:
        """Return where each pool begins in a space that has every memory once."""
        numbers: dict[object, int] = {}
        bases: dict[int, int] = {}
        for pool in pools:
            memory = self._memories.get(pool)
            if memory is None:  # another call has just released it
                raise RequestError(f"there is no pool {pool}")
            bases[pool] = numbers.setdefault(memory, len(numbers)) << _OFFSET_BITS
        return bases

    def _view(self, buffer: Buffer) -> memoryview:
        pool, offset, length = buffer
        view = self._views.get(pool)
        if view is None:
            raise RequestError(f"there is no pool {pool}")
        if offset < 0 or length <= 0 or offset + length > len(view):
            raise RequestError(
                f"bytes {offset} to {offset + length} are not in pool {pool} of {len(view)} bytes"
            )
        return view[offset : offset + length]


def split_hashes(namespace: bytes, hashes: bytes) -> list[bytes]:
    """Return the hashes that were sent in one piece. Raises `RequestError`."""
    if len(namespace) != NAMESPACE_DIGEST_SIZE:
        raise RequestError(f"a namespace digest of {len(namespace)} bytes")
    if len(hashes) % PAGE_HASH_SIZE:
        raise RequestError(f"page hashes of {len(hashes)} bytes in all")
    return [hashes[i : i + PAGE_HASH_SIZE] for i in range(0, len(hashes), PAGE_HASH_SIZE)]


def check_descriptor(descriptor: int, length: int) -> None:
    """Check that `length` bytes of memory can be mapped and stay there; raises `RequestError`.

    Touching a mapping beyond the end of its file would kill the process with SIGBUS, and with it
    everyone's agent. So the memory is sealed against shrinking first; its size is read after that.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise RequestError("the descriptor is not one of memory (memfd_create)")
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise RequestError("the descriptor is not open for reading and writing")
    try:
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError:
        raise RequestError(
            "the memory could be shrunk and cannot be sealed; make it by memfd_create with "
            "MFD_ALLOW_SEALING"
        ) from None
    if not is_ordinary_memory(descriptor):
        # A hole punched into memory of MFD_HUGETLB is a SIGBUS once no huge page is left for it.
        raise RequestError("the descriptor is not one of ordinary memory; drop MFD_HUGETLB")
    size = os.fstat(descriptor).st_size
    if not 0 < length <= size:
        raise RequestError(f"a pool of {length} bytes in a memory of {size} bytes")
