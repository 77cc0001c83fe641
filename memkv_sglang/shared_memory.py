"""Map memory shared between two processes, in huge pages if the kernel provides them.

For direct I/O, the kernel pins every page of the buffer separately, so pages of 2 MiB make reads up
to twice as fast as pages of 4 KiB. Huge pages are best effort: without them, everything works, only
slower.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

HUGE_PAGE = 2 << 20
"""Bytes per huge page on x86-64, and on 64-bit Arm with 4 KiB pages."""

MADV_POPULATE_WRITE = 23
"""Linux 5.14: allocate every page of a range, writable."""

MADV_COLLAPSE = 25
"""Linux 6.1: turn the pages of a range into huge pages, even if the system's policy is `never`."""

CHUNK = 64 << 20
"""Bytes that a thread populates per task."""

THREADS = 8
"""Maximum number of threads. In each of them, the kernel zeroes and copies about 1 GiB/s."""

_TMPFS_MAGIC = 0x01021994
_STATFS_SIZE = 256
"""A buffer larger than `struct statfs`, whose first word is the file system's type."""

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


REPORT_SECONDS = 5.0
"""Seconds between reports of progress."""


def is_ordinary_memory(descriptor: int) -> bool:
    """Return whether the file is tmpfs memory, as opposed to hugetlbfs or a file on disk.

    The kernel fills missing pages of such memory with zeros on first access.
    """
    status = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.fstatfs(descriptor, status):
        raise _error("fstatfs")
    return ctypes.c_long.from_buffer(status).value == _TMPFS_MAGIC


def map_memory(descriptor: int, length: int) -> memoryview:
    """Map the first `length` bytes of a memory file, shared, aligned for huge pages.

    The mapping is removed when the last view of it is freed. Does not touch the memory. Raises
    `OSError`.

    Huge pages need an aligned address, which Python's `mmap` cannot request. So this reserves a
    larger range and maps the file over its aligned part. The kernel maps hugetlb memory
    (MFD_HUGETLB) up to the end of its last huge page, whatever the length (mmap(2)); the reserved
    range includes that, so that no other mapping is overwritten.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    page = max(HUGE_PAGE, os.fstat(descriptor).st_blksize)  # for hugetlb memory, its page size
    reserved = mmap.mmap(-1, -(-length // page) * page + page, flags=flags)
    begin = -_address(memoryview(reserved)) % page
    memory = memoryview(reserved)[begin : begin + length]
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _address(memory)
    mapped = _libc.mmap(address, length, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
    if mapped != address:
        raise _error("map memory")
    return memory


def map_until_exit(descriptor: int, length: int) -> None:
    """Map a file, read-only, until the kernel tears down the process's memory map.

    Nothing unmaps it earlier, and forked children do not inherit it. Raises `OSError`.
    """
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise _error("map file")
    if _libc.madvise(address, length, mmap.MADV_DONTFORK):
        raise _error("exclude a mapping from forked children")


def populate(memory: memoryview, report: Callable[[int], None] | None = None) -> bool:
    """Allocate every page of mapped memory, in huge pages if the kernel provides them.

    Calls `report` with the bytes done so far, every `REPORT_SECONDS`.

    Returns whether all memory is in huge pages, except the end of a range that is too short for
    one. Blocks for about two seconds per GiB and thread. Raises `OSError` if there is not enough
    memory. A kernel before 5.14 allocates the pages on first access instead.
    """
    begin = _address(memory)
    chunks = [
        (begin + offset, min(CHUNK, len(memory) - offset))
        for offset in range(0, len(memory), CHUNK)
    ]
    threads = min(THREADS, len(chunks), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="memkv-populate") as executor:
        futures = {executor.submit(_populate_chunk, chunk): chunk[1] for chunk in chunks}
        while wait(futures, REPORT_SECONDS, FIRST_EXCEPTION).not_done:
            done = [future for future in futures if future.done()]
            if any(future.exception() for future in done):
                executor.shutdown(cancel_futures=True)
                break
            if report is not None:
                report(sum(futures[future] for future in done))
        results = [future.result() for future in futures if not future.cancelled()]
    return all(results)


def _populate_chunk(chunk: tuple[int, int]) -> bool:
    address, length = chunk
    # If the system's policy allows huge pages for shared memory, MADV_POPULATE_WRITE allocates
    # them.
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
