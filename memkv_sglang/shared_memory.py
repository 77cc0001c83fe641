"""Memory that two processes map: of huge pages where the kernel has them, since those decide.

The kernel looks each 4 KiB page of a direct read's target up by itself; with pages of 2 MiB the
same reads reach up to twice the speed. Best effort: without huge pages all works, only slower.
"""

import ctypes
import errno
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

HUGE_PAGE = 2 << 20
"""Bytes of a huge page on x86-64, and on 64-bit Arm with 4 KiB pages."""

MADV_POPULATE_WRITE = 23
"""Linux 5.14: have every page there, writable."""

MADV_COLLAPSE = 25
"""Linux 6.1: make huge pages of what is there now, also where the system's policy is `never`."""

CHUNK = 64 << 20
"""Bytes that one thread populates at a time."""

THREADS = 8
"""Threads at most: the kernel zeroes and copies about 1 GiB/s in each."""

_TMPFS_MAGIC = 0x01021994
_STATFS_SIZE = 256
"""More than `struct statfs` has; the file system's type is its first word."""

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_char_p)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def is_ordinary_memory(descriptor: int) -> bool:
    """Tell whether a file is memory of ordinary pages: not of huge ones only, not a file on disk.

    Missing pages of such memory are always filled with zeros when they are touched.
    """
    status = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.fstatfs(descriptor, status):
        raise _error("fstatfs")
    return ctypes.c_long.from_buffer(status).value == _TMPFS_MAGIC


def map_memory(descriptor: int, length: int) -> memoryview:
    """Map the first `length` bytes of a memory file, shared, where huge pages fit.

    Huge pages need an address that agrees with the file's offset, which Python's `mmap` cannot ask
    for: so it reserves a little more, and the file is mapped over the part that is aligned. Memory
    of huge pages only (MFD_HUGETLB) is mapped up to the end of the last of these, whatever the
    length (mmap(2)): room for that, too, or it would be mapped over what lies behind.
    Unmapped with the last view. Does not touch the memory. Raises `OSError`.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    page = max(HUGE_PAGE, os.fstat(descriptor).st_blksize)  # that of the memory, if it is huge
    reserved = mmap.mmap(-1, -(-length // page) * page + page, flags=flags)
    begin = -_address(memoryview(reserved)) % page
    memory = memoryview(reserved)[begin : begin + length]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    where = _address(memory)
    mapped = _libc.mmap(where, length, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    if mapped != where:
        raise _error("map memory")
    return memory


def map_until_exit(descriptor: int, length: int) -> None:
    """Map a file, read-only, until the process's memory map goes. Raises `OSError`.

    Nothing unmaps it earlier, and forked children do not inherit it.
    """
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise _error("map file")
    if _libc.madvise(address, length, mmap.MADV_DONTFORK):
        raise _error("keep a mapping from children")


def populate(memory: memoryview) -> bool:
    """Have every page of mapped memory there, in huge pages where the kernel grants them.

    Blocks, for about two seconds a GiB and thread. Returns whether all are huge that can be. Raises
    `OSError` where there is not enough memory. A kernel before 5.14 gives the pages at first use.
    """
    begin = _address(memory)
    chunks = [
        (begin + offset, min(CHUNK, len(memory) - offset))
        for offset in range(0, len(memory), CHUNK)
    ]
    threads = min(THREADS, len(chunks), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="memkv-populate") as executor:
        return all(list(executor.map(_populate_chunk, chunks)))


def _populate_chunk(chunk: tuple[int, int]) -> bool:
    address, length = chunk
    # Where the policy lets shared memory have huge pages, they come at once.
    _libc.madvise(address, length, mmap.MADV_HUGEPAGE)
    if _libc.madvise(address, length, MADV_POPULATE_WRITE):
        if ctypes.get_errno() == errno.EINVAL:
            return False
        raise _error("populate")
    whole = length - length % HUGE_PAGE
    return not whole or not _libc.madvise(address, whole, MADV_COLLAPSE)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
