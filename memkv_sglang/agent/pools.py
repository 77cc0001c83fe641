"""Host pools of clients, mapped into the agent."""

import fcntl
import os
import stat
from collections.abc import Sequence

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, Buffer, Page, PageKey
from memkv_sglang.shared_memory import map_memory

MAX_POOLS = 1024
"""Pools of one session; a server registers a handful."""


class RequestError(Exception):
    """A request that cannot be carried out; nothing was touched. The text goes to the client."""


class Pools:
    """The pools of one session, by the client's numbers. Thread-safe.

    Pages hold on to the memory that they lie in: a pool that is released, or whose client is gone,
    is unmapped when the last call that uses it has ended.
    """

    def __init__(self) -> None:
        """Start without any."""
        self._views: dict[int, memoryview] = {}

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
        if len(self._views) >= MAX_POOLS:
            raise RequestError(f"a session may have {MAX_POOLS} pools")
        check_descriptor(descriptor, length)
        try:
            self._views[pool] = map_memory(descriptor, length)
        except (OSError, ValueError, OverflowError) as error:
            raise RequestError(f"pool {pool} cannot be mapped: {error}") from None

    def release(self, pool: int) -> None:
        """Forget a pool. Raises `RequestError`."""
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
    """See that `length` bytes of memory can be mapped and stay there; raises `RequestError`.

    Seals the memory against shrinking if that has not been done: touching a mapping beyond the
    end of its file would kill the process with SIGBUS, and with it everyone's agent.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise RequestError("the descriptor is not one of memory (memfd_create)")
    if not 0 < length <= status.st_size:
        raise RequestError(f"a pool of {length} bytes in a memory of {status.st_size} bytes")
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
