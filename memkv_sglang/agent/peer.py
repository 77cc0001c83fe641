"""Identify the process at the other end of a Unix socket."""

import os
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("@iII")

SO_PEERPIDFD = 77
"""Socket option since Linux 6.5; missing from the `socket` module."""


class Peer(NamedTuple):
    """The process at the other end: the one that connected or, for a client, called `listen`."""

    pid: int
    """0 if the process is not visible in this pid namespace."""
    uid: int


def peer_of(sock: socket.socket) -> Peer:
    """Return the peer of a connected socket (SO_PEERCRED)."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(data)
    return Peer(pid, uid)


def open_peer_pidfd(sock: socket.socket) -> int:
    """Return a new pidfd of the peer's process. Raises `OSError`.

    Before Linux 6.5, this opens the pidfd by pid, which another process may have reused. The pidfd
    is certain to be the peer's only if the peer answers afterwards.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        return os.pidfd_open(peer_of(sock).pid)
