"""Proof that a process can no longer write to anyone's memory.

A pidfd is not enough. It becomes readable when the process ends, but Linux AIO in flight ends only
with the process's memory map, and whoever reads `/proc/PID/smaps` at that moment keeps the map
alive. While a stopped debugger is attached the pidfd may not become readable at all.

So the process locks a memory file and keeps only a mapping of it. The kernel tears a map down in a
fixed order (`__mmput` in kernel/fork.c): it waits for AIO in flight, then removes the mappings, and
with ours the lock. Each thread holds the map until it has made its last system call. Once the lock
is gone, no thread runs and no request is in flight. The lock needs no path, so it works across
mount and pid namespaces.
"""

import fcntl
import mmap
import os

from memkv_sglang.shared_memory import map_until_exit


class Lifetime:
    """A lock that this process's memory map holds until the kernel has torn the map down."""

    def __init__(self) -> None:
        """Take the lock for the rest of the process's life. Raises `OSError`."""
        memory = os.memfd_create("memkv-lifetime", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, mmap.PAGESIZE)
            fcntl.flock(memory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            map_until_exit(memory, mmap.PAGESIZE)
            # Opened again: a duplicate would belong to the same open file, and share its lock.
            self.descriptor = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC)
            """For `has_ended`, in any process."""
        finally:
            os.close(memory)


def has_ended(descriptor: int) -> bool:
    """Return whether the process that made this `Lifetime` can write no more. Does not block."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
