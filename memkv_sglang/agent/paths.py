"""Where the agent's socket is, and the lock that decides who makes it."""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memkv_sglang.config.check import check_socket
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import AgentConfig
from memkv_sglang.flocks import describe_holder

LOCK_LIMIT = 30.0
"""Seconds to wait for another process that is starting an agent."""

_LOCK_PAUSE = 0.02


def socket_path(config: AgentConfig) -> Path:
    """Return the socket's absolute path; raises `ConfigError` if the kernel would refuse it."""
    path = (Path(config.socket) if config.socket else _default_path()).absolute()
    check_socket(str(path), "agent.socket")
    return path


def agent_log(socket: Path) -> Path:
    """Return where an agent that a server started logs to."""
    return socket.with_name("agent.log")


def _default_path() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # The directory is checked for owner and mode before use.
    directory = Path(runtime) / "memkv" if runtime else Path(f"/tmp/memkv-{os.getuid()}")  # noqa: S108
    return directory / "agent.sock"


@contextmanager
def locked_directory(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold the lock on the socket's directory; yields the directory's descriptor.

    Makes the directory if need be. Whoever makes or replaces the socket holds this lock; it ends
    with the last duplicate of the descriptor, in whichever process, and leaves no file behind.
    Blocks for up to `LOCK_LIMIT` if it may `wait`. Raises `ConfigError` if the directory cannot be
    used.
    """
    descriptor = _open_directory(path.parent)
    try:
        _lock(descriptor, path.parent, LOCK_LIMIT if wait else 0.0)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(directory: Path) -> int:
    """Open a directory that is ours alone, after making it if it is not there."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigError(
            f"agent.socket: cannot use the directory {directory} ({error.strerror}); name another"
        ) from None
    status = os.fstat(descriptor)
    complaint = ""
    if status.st_uid != os.getuid():
        complaint = f"belongs to uid {status.st_uid}; name one of your own"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        complaint = f"is open to others; chmod 700 {directory} or name another"
    if complaint:
        os.close(descriptor)
        raise ConfigError(f"agent.socket: the directory {directory} {complaint}")
    return descriptor


def _lock(descriptor: int, directory: Path, limit: float) -> None:
    deadline = time.monotonic() + limit
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"agent.socket: {directory} is locked by another process"
                    f"{describe_holder(descriptor)} that starts an agent; end it or name another "
                    "path"
                ) from None
            time.sleep(_LOCK_PAUSE)
        else:
            return
