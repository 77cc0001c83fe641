"""Rotate `agent.log`, the stderr of an agent that a server started.

This bounds everything that writes to stderr, including C libraries and tracebacks.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

LOG_LIMIT = 16 << 20
"""Bytes after which `agent.log` is renamed to `agent.log.1`, replacing an earlier one."""

CHECK_INTERVAL = 1.0
"""Seconds between checks of the log's length."""


def open_log(path: Path) -> int:
    """Rotate the log if it is long, then open it for appending. Raises `OSError`."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            path.rename(path.with_name(path.name + ".1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def watch_log(path: Path) -> None:
    """Start a thread that rotates the log. Does nothing if stderr is another file."""
    if _is_stderr(path):
        threading.Thread(target=_watch, args=[path], name="memkv-log", daemon=True).start()


def _watch(path: Path) -> None:
    while True:
        time.sleep(CHECK_INTERVAL)
        limit_log(path)


def limit_log(path: Path) -> None:
    """Redirect stderr and stdout to a new file if the log is too long, moved or removed."""
    length = os.fstat(sys.stderr.fileno()).st_size
    if length <= LOG_LIMIT and _is_stderr(path):
        return
    try:
        descriptor = open_log(path)
    except OSError:  # The directory may be gone. Keep the open file, but limit its length.
        if length > LOG_LIMIT:
            with suppress(OSError):
                os.ftruncate(sys.stderr.fileno(), 0)
        return
    os.dup2(descriptor, sys.stderr.fileno())
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(sys.stderr.fileno()))
    except OSError:
        return False
