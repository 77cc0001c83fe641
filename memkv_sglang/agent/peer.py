"""Who is at the other end of a Unix socket."""

import os
import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("@iII")

SO_PEERPIDFD = 77
"""From Linux 6.5 on; `socket` has no name for it yet."""


class Peer(NamedTuple):
    """The process that connected, or, seen from a client, the one that called `listen`."""

    pid: int
    """0 if it cannot be seen from this process's pid namespace."""
    uid: int


def peer_of(sock: socket.socket) -> Peer:
    """Ask the kernel (SO_PEERCRED)."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(data)
    return Peer(pid, uid)


def open_peer_pidfd(sock: socket.socket) -> int:
    """Return a new descriptor that stands for the peer's process; raises `OSError`.

    Before Linux 6.5 it is made from the pid, which another process may have by now: only a peer
    that answers afterwards shows that it is the right one.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        return os.pidfd_open(peer_of(sock).pid)
