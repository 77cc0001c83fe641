"""Find the process that holds a lock (flock) on a file."""

import os
from contextlib import suppress
from pathlib import Path

_PF_EXITING = 0x4
"""Flag of a process that the kernel is tearing down; see include/linux/sched.h."""


def lock_holder(descriptor: int) -> int | None:
    """Return the pid of the process that has locked the file; None if unknown."""
    status = os.fstat(descriptor)
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    file_id = f"{major:02x}:{minor:02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        if fields[1:2] == ["FLOCK"] and fields[5:6] == [file_id] and int(fields[4]) > 0:
            return int(fields[4])
    return None


def describe_holder(descriptor: int) -> str:
    """Return ` (pid N)` for the process that has locked the file; empty if unknown."""
    pid = lock_holder(descriptor)
    return "" if pid is None else f" (pid {pid})"


def is_ending(pid: int) -> bool:
    """Return whether a process was killed or has exited, but still exists.

    Its requests in flight on a hung disk keep the process and its locks.
    """
    with suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return bool(int(after_name[6]) & _PF_EXITING)
    return False
