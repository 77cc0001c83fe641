"""Read and write vectors completely, bypassing the page cache where the file system allows it."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Sequence

from memkv_sglang.tiers.nvme.files import Folder

BLOCK = 4096
"""Alignment of memory, lengths and file offsets. It suffices for O_DIRECT on any disk."""

MAX_VECTORS: int = os.sysconf("SC_IOV_MAX")
"""Maximum number of buffers per system call."""

_PROBE = ".direct-io-probe"
_NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)
_NO_PROBE = (errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ELOOP)
"""Errors of the probe that say nothing about O_DIRECT: the disk is full, or the probe's name is
taken."""


def pad_to_block(length: int) -> int:
    """Return the length rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def is_aligned(buffers: Iterable[memoryview]) -> bool:
    """Return whether O_DIRECT can use these buffers directly.

    Returns False for read-only memory, because its address is not available. It must be copied.
    """
    return all(
        len(buffer) % BLOCK == 0
        and (not buffer or (not buffer.readonly and address_of(buffer) % BLOCK == 0))
        for buffer in buffers
    )


def address_of(buffer: memoryview) -> int:
    """Return the address of a writable buffer; 0 for an empty one."""
    if not buffer:
        return 0
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def aligned_memory(size: int) -> memoryview:
    """Return zeroed memory that begins at a page boundary. It is freed with its last view."""
    return memoryview(mmap.mmap(-1, pad_to_block(max(size, 1)), flags=mmap.MAP_PRIVATE))


def read_fully(fd: int, vectors: Sequence[memoryview], offset: int) -> None:
    """Fill the vectors, reading from `offset`. Raises `OSError`; `EOFError` at the file's end."""
    _transfer(os.preadv, fd, vectors, offset)


def write_fully(fd: int, vectors: Sequence[memoryview], offset: int) -> None:
    """Write the vectors at `offset`. After an `OSError`, the content there is undefined."""
    _transfer(os.pwritev, fd, vectors, offset)


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    vectors: Sequence[memoryview],
    offset: int,
) -> None:
    while vectors:
        batch = vectors[:MAX_VECTORS]
        moved = call(fd, batch, offset)
        if moved == 0 and any(batch):
            raise EOFError(f"nothing at offset {offset}")
        offset += moved
        vectors = [*_remaining(batch, moved), *vectors[MAX_VECTORS:]]


def _remaining(vectors: Sequence[memoryview], moved: int) -> list[memoryview]:
    """Return the vectors without their first `moved` bytes."""
    for i, vector in enumerate(vectors):
        if moved < len(vector):
            return [vector[moved:], *vectors[i + 1 :]]
        moved -= len(vector)
    return []


def supports_direct_io(folder: Folder) -> bool:
    """Return whether files in the directory can be written with O_DIRECT, by writing one.

    If the probe file cannot be created, for example because the disk is full, opens existing
    segments instead. Without segments, assumes that O_DIRECT works.
    """
    try:
        _write_probe(folder)
    except OSError as error:
        if error.errno in _NO_PROBE:
            names = (name for name in folder.names() if name.endswith(".seg"))
            return all(_opens_directly(folder, name) for name in names)
        if error.errno not in _NO_DIRECT_IO:
            raise
        return False
    return True


def _write_probe(folder: Folder) -> None:
    fd = -1
    try:
        fd = folder.open(_PROBE, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        write_fully(fd, [aligned_memory(BLOCK)], 0)
    finally:
        if fd >= 0:
            os.close(fd)
        folder.remove_unfinished(_PROBE)


def _opens_directly(folder: Folder, name: str) -> bool:
    try:
        os.close(folder.open(name, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        return error.errno not in _NO_DIRECT_IO
    return True
