"""`python -m ... LOCK`: the agent, with a disk that fails on demand.

While the file that the environment names in `DISK_FAULT` exists, reads and writes of pages and of
the journal raise the error that it names (EIO, ENOSPC). If a directory follows (`EIO /mnt/b`), only
calls on files in it fail. Most machines have no device that fails on demand, so the system calls
are replaced. AIO then accepts no request, and the tier falls back to these calls.
"""

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memkv_sglang.agent.__main__ import main
from memkv_sglang.tiers.disks import disk
from memkv_sglang.tiers.nvme import faults as nvme_faults
from memkv_sglang.tiers.nvme import space_reclaimer
from memkv_sglang.tiers.nvme.disk.linux_aio import Context

DISK_FAULT = "MEMKV_TEST_DISK_FAULT"

CALLS = ("preadv", "pwritev", "pwrite")


def failing(call: Callable[..., Any], control: Path) -> Callable[..., Any]:
    """Return a system call that fails while the control file exists."""

    def fail_or_call(*args: Any) -> Any:
        if control.exists():
            name, _, directory = control.read_text().partition(" ")
            if not directory or _file(args).is_relative_to(directory):
                code = getattr(errno, name)
                raise OSError(code, os.strerror(code))
        return call(*args)

    return fail_or_call


def _file(args: Sequence[Any]) -> Path:
    """Return the file of a call: its first argument is a descriptor, or its last one a request."""
    descriptor = args[0] if isinstance(args[0], int) else args[-1].fd
    return Path(f"/proc/self/fd/{descriptor}").readlink()


if __name__ == "__main__":
    if DISK_FAULT in os.environ:
        fault = Path(os.environ[DISK_FAULT])
        for name in CALLS:
            setattr(os, name, failing(getattr(os, name), fault))
        Context.submit = failing(Context.submit, fault)  # type: ignore[method-assign]
    # By default, a failed disk is retried after 30 s, which is longer than a round.
    for module in (nvme_faults, space_reclaimer):
        vars(module)["PAUSE"] = 1.0
    disk.RETRY_SECONDS = 1.0
    main()
