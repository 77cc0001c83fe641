"""Stall other processes, watch them, and wait for them."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_READER = """
import sys
try:
    while True:
        open(f"/proc/{sys.argv[1]}/smaps_rollup").read()
        print(flush=True)
except OSError:
    pass
"""


@contextmanager
def map_readers(pid: int, count: int) -> Iterator[None]:
    """Run processes that read another process's memory map all the time, as monitoring does."""
    command = [sys.executable, "-S", "-c", _READER, str(pid)]
    readers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            reader.stdout.readline()
            threading.Thread(target=reader.stdout.read, daemon=True).start()
        yield
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()


def suspend(pid: int, limit: float = 60.0) -> None:
    """Send SIGSTOP to a process and wait until all its threads have stopped.

    Raises `TimeoutError` if one still runs after `limit` seconds.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + limit
    while any(_state(thread) != "T" for thread in Path(f"/proc/{pid}/task").iterdir()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not stop within {limit:g} s")
        time.sleep(0.001)


def _state(thread: Path) -> str:
    """Return the state of a thread, the first field after its name."""
    return (thread / "stat").read_text().rpartition(") ")[2][0]


@contextmanager
def stalled(pid: int) -> Iterator[None]:
    """Stop a process with SIGSTOP, and continue it at the end of the block."""
    process = os.pidfd_open(pid)
    try:
        suspend(pid)
        yield
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGCONT)
        os.close(process)


@contextmanager
def ending(pid: int, limit: float = 60.0) -> Iterator[int]:
    """Yield a process's pidfd. At the end of the block, wait until the process has ended.

    Raises `RuntimeError` if it has not ended within `limit` seconds.
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
