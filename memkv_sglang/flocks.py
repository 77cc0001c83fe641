"""Find the process that holds a lock (flock) on a file."""

import os
from pathlib import Path


def describe_holder(descriptor: int) -> str:
    """Return ` (pid N)` for the process that has locked the file; empty if unknown."""
    status = os.fstat(descriptor)
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    file_id = f"{major:02x}:{minor:02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        if fields[1:2] == ["FLOCK"] and fields[5:6] == [file_id] and int(fields[4]) > 0:
            return f" (pid {fields[4]})"
    return ""
