"""Set the CPUs and memory that the agent may use, and its OOM score.

A server may bind each rank's threads and memory to one NUMA node. Child processes inherit that, but
the agent serves every rank.
"""

import ctypes
import logging
import os
import platform
from pathlib import Path

log = logging.getLogger(__name__)

MOST_CPUS = 8192
"""Maximum number of CPUs that Linux supports. The kernel ignores CPUs that do not exist or are not
allowed."""

MPOL_DEFAULT = 0
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Number of the system call set_mempolicy, which libc does not wrap."""


def use_whole_machine() -> None:
    """Remove the CPU affinity and memory policy that this process has inherited.

    Call it before starting threads, which inherit both. Cgroup limits still apply. Never raises.
    """
    try:
        os.sched_setaffinity(0, range(MOST_CPUS))
    except OSError as error:
        log.warning("CPU affinity kept", extra={"fields": {"reason": str(error)}})
    number = SET_MEMPOLICY.get(platform.machine())
    if number is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(number, MPOL_DEFAULT, None, 0):
            reason = os.strerror(ctypes.get_errno())
            log.warning("memory policy kept", extra={"fields": {"reason": reason}})


def set_oom_score(adjustment: int) -> None:
    """Set how readily the kernel kills this process when memory runs out; 0 changes nothing.

    Lowering it needs CAP_SYS_RESOURCE. Logs a failure.
    """
    if not adjustment:
        return
    try:
        Path("/proc/self/oom_score_adj").write_text(str(adjustment))
    except OSError as error:
        fields = {"wanted": adjustment, "reason": error.strerror}
        log.warning("agent.oom_score_adj not set", extra={"fields": fields})
