"""`python -m ... LOCK`: the agent, with a disk that fails as the kernel lets it fail.

Where the environment names a file in `DISK_FAULT` and it is there, reads and writes of pages and
of the journal raise the error whose name it holds (EIO, ENOSPC). The system calls themselves are
replaced, as tests of the tier do, since most machines have no device that fails on demand; AIO
takes nothing then, and what it does not take is left to these calls.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memkv_sglang.agent.__main__ import main
from memkv_sglang.tiers.nvme import faults as nvme_faults
from memkv_sglang.tiers.nvme import space_reclaimer
from memkv_sglang.tiers.nvme.disk.linux_aio import Context

DISK_FAULT = "MEMKV_TEST_DISK_FAULT"

CALLS = ("preadv", "pwritev", "pwrite")


def failing(call: Callable[..., Any], control: Path) -> Callable[..., Any]:
    """Return the system call as a failing disk has it."""

    def fail_or_call(*args: Any) -> Any:
        if control.exists():
            code = getattr(errno, control.read_text())
            raise OSError(code, os.strerror(code))
        return call(*args)

    return fail_or_call


if __name__ == "__main__":
    if DISK_FAULT in os.environ:
        fault = Path(os.environ[DISK_FAULT])
        for name in CALLS:
            setattr(os, name, failing(getattr(os, name), fault))
        Context.submit = failing(Context.submit, fault)  # type: ignore[method-assign]
    # A disk that failed is tried again after 30 s, which would be a round's whole length.
    for module in (nvme_faults, space_reclaimer):
        vars(module)["PAUSE"] = 1.0
    main()
