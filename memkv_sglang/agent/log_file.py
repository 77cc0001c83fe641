"""`agent.log`, the stderr of an agent that a program starts: it stays bounded while the agent runs.

Everything that writes to stderr is covered, C libraries and tracebacks included.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

LOG_LIMIT = 16 << 20
"""Bytes after which `agent.log` becomes `agent.log.1`, which replaces the one before."""

LOOK_SECONDS = 1.0
"""How often a running agent looks at the length of its log."""


def open_log(path: Path) -> int:
    """Open the log for appending; a long one moves aside first. Raises `OSError`."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > LOG_LIMIT:
            path.rename(path.with_name(path.name + ".1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def watch_log(path: Path) -> None:
    """Rotate the log from now on, in a thread; does nothing if stderr is another file."""
    if _is_stderr(path):
        threading.Thread(target=_watch, args=[path], name="memkv-log", daemon=True).start()


def _watch(path: Path) -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        limit_log(path)


def limit_log(path: Path) -> None:
    """Let stderr and stdout go to a new file if the log is long, or was moved or removed."""
    length = os.fstat(sys.stderr.fileno()).st_size
    if length <= LOG_LIMIT and _is_stderr(path):
        return
    try:
        descriptor = open_log(path)
    except OSError:  # the directory may be gone; then there is no other place for the lines
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
