"""Other people's processes: stalled for a while, and waited for."""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def stalled(pid: int) -> Iterator[None]:
    """Let a process do nothing until the block ends, if it is alive then."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGSTOP)
        yield
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGCONT)
        os.close(process)


@contextmanager
def ending(pid: int, limit: float = 60.0) -> Iterator[int]:
    """Yield the process's descriptor (pidfd); wait at the block's end until the process has ended.

    Raises `RuntimeError` if it has not within `limit` seconds.
    """
    process = os.pidfd_open(pid)
    try:
        yield process
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(limit * 1000):
            raise RuntimeError(f"process {pid} did not end within {limit:g} s")
    finally:
        os.close(process)
