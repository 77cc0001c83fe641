"""Raise the system's limits for the agent where possible, and report limits that are too low."""

import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

DESCRIPTORS = 16_384
"""Open files that a large node needs: a thousand segment files per TB, plus connections."""

REQUESTS = 1024
"""Linux AIO requests that concurrent calls of eight servers need."""

_AIO = Path("/proc/sys/fs")
_AIO_LIMIT = "aio-max-nr"

_PROCESS = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")


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


def raise_disk_request_limit(folder: Path = _AIO) -> str:
    """Raise the system's limit of AIO requests if it is too low, which only root may.

    Returns a warning if it stays too low, else "".
    """
    if missing_disk_requests(folder):
        with suppress(OSError, ValueError):
            limit = folder / _AIO_LIMIT
            limit.write_text(f"{_enough_requests(int(limit.read_text()))}\n")
    return missing_disk_requests(folder)


def missing_disk_requests(folder: Path = _AIO) -> str:
    """Return a one-line warning if the system has too few AIO requests left, else ""."""
    try:
        most, used = (int((folder / name).read_text()) for name in (_AIO_LIMIT, "aio-nr"))
    # The kernel lacks AIO or a container hides these files. The disk then uses threads.
    except (OSError, ValueError):
        return ""
    if most - used >= REQUESTS:
        return ""
    return (
        f"the system has {most - used} of {most} disk requests (AIO) left, and a large node needs "
        f"{REQUESTS}; raise them: sysctl -w fs.{_AIO_LIMIT}={_enough_requests(most)}"
    )


def _enough_requests(most: int) -> int:
    return max(1 << 20, 2 * most)


def missing_cpus(process: Path = _PROCESS, cgroups: Path = _CGROUPS) -> str:
    """Return a one-line warning if this process may not use all CPUs, else "".

    Covers the CPU affinity, which a cpuset limits, and quotas of cgroup v2.
    """
    present = os.cpu_count() or 1
    allowed = min(len(os.sched_getaffinity(0)), *_quotas(process, cgroups), math.inf)
    if allowed >= present:
        return ""
    return (
        f"the system allows {allowed:.3g} of {present} CPUs; raise the CPU limit of the container "
        "or unit (systemd: CPUQuota, AllowedCPUs, CPUAffinity)"
    )


def _quotas(process: Path, cgroups: Path) -> Iterator[float]:
    """Yield the CPUs that each cgroup around the process may use, if it has a quota."""
    with suppress(OSError, ValueError):
        lines = (process / "cgroup").read_text().splitlines()
        group = PurePosixPath(next((line[3:] for line in lines if line.startswith("0::")), "/"))
        for folder in (group, *group.parents):
            with suppress(OSError):  # the root has no limits
                quota, period = (cgroups / str(folder).lstrip("/") / "cpu.max").read_text().split()
                if quota != "max":
                    yield int(quota) / int(period)
