"""The agent's listening socket: created, replaced and removed without races."""

import os
import socket
from contextlib import nullcontext
from pathlib import Path

from memkv_sglang.agent.paths import locked_directory
from memkv_sglang.agent.peer import Peer, peer_of
from memkv_sglang.config.errors import ConfigError

_BACKLOG = 128


def serving_peer(path: Path) -> Peer | None:
    """Return the process that listens on the socket, or None. Does not wait for an answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:  # its backlog is full
            return Peer(0, os.getuid())
        except OSError:
            return None
        return peer_of(probe)


class Listener:
    """A listening socket with mode 0600, in a directory that only its owner can enter."""

    def __init__(self, path: Path, *, locked: bool, wait: bool = True) -> None:
        """Bind the socket, replacing a stale one. Raises `ConfigError`.

        `locked`: the caller already holds the directory's lock. Otherwise this takes it, and blocks
        for it if `wait` is true.
        """
        self.path = path
        with nullcontext() if locked else locked_directory(path, wait=wait):
            _remove_stale(path)
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.socket.bind(os.fspath(path))
                path.chmod(0o600)
                self._identity = _identity(path)
                self.socket.listen(_BACKLOG)
            except OSError as error:
                self.socket.close()
                raise ConfigError(f"agent.socket: cannot bind {path} ({error.strerror})") from None
        self.socket.setblocking(False)

    def is_in_place(self) -> bool:
        """Return whether clients that connect to the path reach this listener."""
        identity = _identity(self.path)
        if identity is not None and identity != self._identity:
            peer = serving_peer(self.path)
            # still our socket, only its mtime has changed
            if peer is not None and peer.pid == os.getpid():
                self._identity = identity
        return identity == self._identity

    def close(self, *, locked: bool = False) -> None:
        """Remove the socket unless another process has replaced it. Idempotent.

        `locked`: as in the constructor. Raises `ConfigError` if the lock cannot be taken.
        """
        if self.socket.fileno() >= 0 and _identity(self.path) == self._identity:
            with nullcontext() if locked else locked_directory(self.path):
                if _identity(self.path) == self._identity:
                    self.path.unlink()
        self.socket.close()


def _remove_stale(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_socket():
        raise ConfigError(f"agent.socket: {path} exists and is not a socket; set another path")
    peer = serving_peer(path)
    if peer is not None:
        raise ConfigError(
            f"agent.socket: another agent (pid {peer.pid}) serves {path}; stop it or set another "
            "path"
        )
    path.unlink()


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return an identity that differs even if a new file reuses the inode."""
    try:
        status = path.lstat()
    except OSError:  # removed, or in a directory we can no longer access
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
