"""Check the system limits that the agent and the servers can reach."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from memkv_sglang.agent.limits import DESCRIPTORS, missing_cpus, missing_disk_requests
from memkv_sglang.cli.output import human_size
from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import Config
from memkv_sglang.finding import Finding, split_problem
from memkv_sglang.tiers.minio.http.transport import TLS_WINDOW

RMEM_MAX = Path("/proc/sys/net/core/rmem_max")

RDMA = Path("/sys/class/infiniband")
"""Where the kernel lists RDMA devices."""


def check_limits(config: Config) -> Iterator[Finding]:
    """Check the limits of this shell. An agent or server started from it inherits them."""
    yield check_cpus()
    yield check_files()
    if config.nvme.directory:
        problem = missing_disk_requests()
        if problem:
            yield split_problem("aio", problem, "warn")
        else:
            yield Finding("ok", "aio", "enough disk requests left (fs.aio-max-nr)")
    yield check_locked_memory()
    if any(url.startswith("https:") for url in endpoint_urls(config.minio)):
        yield check_receive_buffer()


def check_cpus() -> Finding:
    """Check whether a process may use all CPUs."""
    problem = missing_cpus()
    if problem:
        return split_problem("cpus", problem, "warn")
    return Finding("ok", "cpus", f"a process may use all {os.cpu_count()} CPUs")


def check_files() -> Finding:
    """Check how many files a process may open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or most >= DESCRIPTORS:
        return Finding("ok", "open files", f"a process may open {_shown(most)}")
    return Finding(
        "warn",
        "open files",
        f"a process may open {most}, and a large node needs {DESCRIPTORS}",
        "raise the hard limit: LimitNOFILE= in a unit, nofile in /etc/security/limits.conf",
    )


def check_locked_memory(devices: Path = RDMA) -> Finding:
    """Check how much memory a process may lock. Only RDMA transfers need to lock much."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if most == resource.RLIM_INFINITY:
        return Finding("ok", "memlock", "a process may lock all of its memory")
    allowed = f"a process may lock {human_size(most)}"
    if not (devices.is_dir() and any(devices.iterdir())):
        return Finding(
            "ok", "memlock", f"{allowed}; this node has no RDMA device, which needs more"
        )
    return Finding(
        "warn",
        "memlock",
        f"{allowed}, so servers cannot register their pools for RDMA (prefill-decode transfers)",
        "set LimitMEMLOCK=infinity in the servers' unit, or ulimit -l unlimited",
    )


def check_receive_buffer(limit: Path = RMEM_MAX) -> Finding:
    """Check the maximum receive buffer. A large one makes loads from MinIO over TLS faster."""
    try:
        most = int(limit.read_text())
    except (OSError, ValueError):  # a container hides the file
        return Finding("skip", "rmem_max", f"{limit} cannot be read")
    if most >= TLS_WINDOW:
        return Finding("ok", "rmem_max", f"receive buffers may have {human_size(most)}")
    return Finding(
        "warn",
        "rmem_max",
        f"receive buffers may have {human_size(most)}; loads over TLS are faster with "
        f"{human_size(TLS_WINDOW)}",
        f"sysctl -w net.core.rmem_max={TLS_WINDOW}, and in /etc/sysctl.d",
    )


def _shown(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
