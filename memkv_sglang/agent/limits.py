"""Raise the system's limits for the agent where possible, and report limits that are too low."""

import resource
from pathlib import Path

DESCRIPTORS = 16_384
"""Open files that a large node needs: a thousand segment files per TB, plus connections."""

REQUESTS = 1024
"""Linux AIO requests that concurrent calls of eight servers need."""

_AIO = Path("/proc/sys/fs")


def raise_descriptor_limit() -> str:
    """Raise the limit of open files; return a warning if the system keeps it too low, else ""."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if most == resource.RLIM_INFINITY else max(most, DESCRIPTORS)
    for limit in (wanted, most):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, most)))
        except (ValueError, OSError):  # the process may not raise its limit this far
            continue
        break
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed >= DESCRIPTORS:
        return ""
    return (
        f"the system allows {allowed} open files, and a large node needs {DESCRIPTORS}; raise "
        "`ulimit -n` (systemd: LimitNOFILE)"
    )


def missing_disk_requests(folder: Path = _AIO) -> str:
    """Return a one-line warning if the system has too few AIO requests left, else ""."""
    try:
        most, used = (int((folder / name).read_text()) for name in ("aio-max-nr", "aio-nr"))
    # The kernel lacks AIO or a container hides these files. The disk then uses threads.
    except (OSError, ValueError):
        return ""
    if most - used >= REQUESTS:
        return ""
    return (
        f"the system has {most - used} of {most} disk requests (AIO) left, and a large node needs "
        f"{REQUESTS}; raise them: sysctl -w fs.aio-max-nr={max(1 << 20, 2 * most)}"
    )
