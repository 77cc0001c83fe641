"""Find the agent's socket and lock its directory."""

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

SERVICE_DIRECTORY = Path("/run/memkv")
"""Where a service's socket is, so that servers and shells of the service's user find it."""

LOCK_LIMIT = 30.0
"""Seconds to wait while another process starts an agent."""

_LOCK_PAUSE = 0.02


def socket_path(config: AgentConfig) -> Path:
    """Return the socket's absolute path. Raises `ConfigError` if the kernel would reject it."""
    path = (Path(config.socket) if config.socket else _default_path()).absolute()
    check_socket(str(path), "agent.socket")
    return path


def agent_log(socket: Path) -> Path:
    """Return the log file of an agent that a server started."""
    return socket.with_name("agent.log")


def private_directory(name: str) -> Path:
    """Return a directory of this node's user next to the default socket, creating it if needed.

    No other user can change what is in it. Raises `ConfigError`.
    """
    parent = _default_path().parent
    os.close(_open_directory(parent))
    os.close(_open_directory(parent / name))
    return parent / name


def _default_path() -> Path:
    if _is_own(SERVICE_DIRECTORY):
        return SERVICE_DIRECTORY / "agent.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # Safe in /tmp: `_open_directory` checks owner and mode.
    directory = Path(runtime) / "memkv" if runtime else Path(f"/tmp/memkv-{os.getuid()}")  # noqa: S108
    return directory / "agent.sock"


def _is_own(directory: Path) -> bool:
    try:
        return directory.stat().st_uid == os.getuid()
    except OSError:
        return False


@contextmanager
def locked_directory(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Lock the socket's directory, creating it if needed; yield the directory's descriptor.

    Hold this lock to create or replace the socket. It is released with the last duplicate of the
    descriptor, in any process, and needs no lock file. With `wait`, blocks for up to `LOCK_LIMIT`
    seconds. Raises `ConfigError` if the directory cannot be used or locked.
    """
    descriptor = _open_directory(path.parent)
    try:
        _lock(descriptor, path.parent, LOCK_LIMIT if wait else 0.0)
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(directory: Path) -> int:
    """Open a directory that only this user can access, creating it if needed."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigError(
            f"agent.socket: cannot use the directory {directory} ({error.strerror}); set another "
            "path"
        ) from None
    status = os.fstat(descriptor)
    complaint = ""
    if status.st_uid != os.getuid():
        complaint = f"belongs to uid {status.st_uid}; set a path in one of your own"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        complaint = f"is accessible to others; run chmod 700 {directory}, or set another path"
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
                    f"{describe_holder(descriptor)} that is starting an agent; stop it or set "
                    "another path"
                ) from None
            time.sleep(_LOCK_PAUSE)
        else:
            return
