"""Proof that a process can no longer write to shared memory.

A pidfd is not enough. It becomes readable when the process ends, but Linux AIO in flight ends only
with the process's memory map, and another process that is reading `/proc/PID/smaps` keeps the map
alive. While a stopped debugger is attached, the pidfd may not become readable at all.

So the process locks a memfd and keeps only a mapping of it. The kernel tears down a memory map in a
fixed order (`__mmput` in kernel/fork.c): it waits for AIO in flight, then removes the mappings, and
with ours the lock. Each thread holds the map until its last system call. Once the lock is released,
no thread runs and no request is in flight. The lock needs no path, so it works across mount and pid
namespaces.
"""

import fcntl
import mmap
import os

from memkv_sglang.shared_memory import map_until_exit


class LifetimeMemory:
    """The memory that a `Lifetime` locks. A supervisor creates it, then forks the agent."""

    def __init__(self) -> None:
        """Allocate the memory. Raises `OSError`."""
        self.descriptor = os.memfd_create("memkv-lifetime", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, mmap.PAGESIZE)

    def is_of(self, descriptor: int) -> bool:
        """Return whether a `Lifetime.descriptor` refers to this memory."""
        return os.path.sameopenfile(self.descriptor, descriptor)

    def reopen(self, flags: int) -> int:
        """Return a descriptor with its own lock; a duplicate would share the lock."""
        return os.open(f"/proc/self/fd/{self.descriptor}", flags | os.O_CLOEXEC)

    def close(self) -> None:
        """Close this process's descriptor."""
        os.close(self.descriptor)


class Lifetime:
    """A lock that this process's memory map holds until the kernel has torn it down."""

    def __init__(self, memory: LifetimeMemory | None = None) -> None:
        """Take the lock for the rest of the process's life.

        Raises `OSError`. Closes `memory`; if None, allocates its own.
        """
        memory = memory or LifetimeMemory()
        try:
            locked = memory.reopen(os.O_RDWR)
            try:
                fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                map_until_exit(locked, mmap.PAGESIZE)
                self.descriptor = memory.reopen(os.O_RDONLY)
                """Any process that receives this descriptor can call `has_ended` on it."""
            finally:
                os.close(locked)
        finally:
            memory.close()


def has_ended(descriptor: int) -> bool:
    """Return whether the process that holds this `Lifetime` can no longer write. Never blocks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
