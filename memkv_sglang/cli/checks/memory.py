"""Check shared memory for host pools."""

import ctypes
import mmap
import os
from collections.abc import Iterator

from memkv_sglang.finding import Finding

HUGE = 2 << 20
"""Size of a huge page in bytes."""

MADV_COLLAPSE = 25
"""Number of the advice in madvise(2), since Linux 6.1. The `mmap` module lacks it."""

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


def check_memory() -> Iterator[Finding]:
    """Check that a memfd can be created and backed by huge pages."""
    try:
        descriptor = os.memfd_create("memkv-doctor")
    except OSError as error:
        yield Finding(
            "FAIL", "memfd", f"cannot be created ({error.strerror})", "use Linux 3.17 or later"
        )
        return
    try:
        yield Finding("ok", "memfd", "shared memory for host pools works")
        os.ftruncate(descriptor, HUGE)
        yield _huge_pages(descriptor)
    finally:
        os.close(descriptor)


def _huge_pages(descriptor: int) -> Finding:
    error = _collapse(descriptor)
    if error:
        return Finding(
            "warn",
            "huge pages",
            f"not available for shared memory ({os.strerror(error)}), which halves disk throughput",
            "use Linux 6.1 or later with transparent huge pages",
        )
    return Finding("ok", "huge pages", "available for shared memory")


def _collapse(descriptor: int) -> int:
    """Map one huge page of the file, aligned, and collapse it; return 0 or an errno.

    Calls libc, because Python's `mmap` cannot choose the address.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    reserved = libc.mmap(None, 2 * HUGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if reserved == _MAP_FAILED:
        return ctypes.get_errno()
    try:
        aligned = -(-reserved // HUGE) * HUGE
        access = mmap.PROT_READ | mmap.PROT_WRITE
        if libc.mmap(aligned, HUGE, access, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != aligned:
            return ctypes.get_errno()
        ctypes.memset(aligned, 1, HUGE)
        return ctypes.get_errno() if libc.madvise(aligned, HUGE, MADV_COLLAPSE) else 0
    finally:
        libc.munmap(reserved, 2 * HUGE)
