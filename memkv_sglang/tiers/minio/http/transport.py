"""Bytes in and out of one connected socket, plain or TLS, each call bounded by a timeout."""

import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from memkv_sglang.tiers.minio.http.addresses import Address

IOV_LIMIT = 512
"""Buffers for one system call; the kernel takes at most 1024."""

TLS_WINDOW = 4 << 20
"""Bytes that a TLS connection asks for as its receive buffer; the kernel doubles them."""

_WINDOW_LIMIT = Path("/proc/sys/net/core/rmem_max")

TLS_CHUNK = 256 << 10
"""Bytes for one TLS write, so that a slow but moving transfer is not taken for a stalled one."""

WAIT_LIMIT = 1e-3
"""Shortest timeout in seconds: the kernel takes 0 for none at all."""


KEEP_ALIVE = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
}
"""Seconds until the first probe and between two, and unanswered probes that end a connection."""


class Transport(Protocol):
    """A connected stream. Its calls raise `OSError`, `TimeoutError` after the timeout."""

    def set_timeout(self, seconds: float) -> None:
        """Bound the time of each following call."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send from the buffers in order, return how many bytes went (at least 1)."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers in order as far as time allows, return the bytes; 0 at the end."""

    def receive_some(self, buffer: memoryview) -> int:
        """Return as soon as any bytes are there; 0 at the end."""

    @property
    def fileno(self) -> int:
        """The socket's descriptor, to poll."""

    def send_now(self, request: bytes) -> None:
        """Send all of a few bytes without blocking; raises `OSError` if there is no room."""

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        """Receive what is there into the buffers in order; 0 at the end.

        Does not block: raises `BlockingIOError` where there is nothing. When it leaves room in the
        first buffer, a poll of the descriptor tells of all that is still to come.
        """

    def is_idle(self) -> bool:
        """Tell whether the peer has neither sent anything unread nor closed; does not block."""

    def interrupt(self) -> None:
        """Make the call that another thread has under way fail."""

    def close(self) -> None:
        """Close the socket."""


class PlainTransport:
    """A blocking socket with kernel timeouts: `MSG_WAITALL` fills a page in one system call.

    A Python timeout would make the socket non-blocking, and each call return what little is there.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        sock.settimeout(None)
        self._socket = sock
        self._poll = _poll_of(sock)
        self._timeout = 0.0

    def set_timeout(self, seconds: float) -> None:
        """Set `SO_RCVTIMEO` and `SO_SNDTIMEO`, which count a call's waiting in total."""
        if seconds == self._timeout:
            return
        self._timeout = seconds
        seconds = max(seconds, WAIT_LIMIT)
        value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send with one system call."""
        try:
            return self._socket.sendmsg(buffers[:IOV_LIMIT])
        except BlockingIOError as error:
            raise TimeoutError from error

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Fill with one system call."""
        try:
            return self._socket.recvmsg_into(buffers[:IOV_LIMIT], 0, socket.MSG_WAITALL)[0]
        except BlockingIOError as error:
            raise TimeoutError from error

    def receive_some(self, buffer: memoryview) -> int:
        """Receive what is there."""
        try:
            return self._socket.recv_into(buffer)
        except BlockingIOError as error:
            raise TimeoutError from error

    @property
    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def send_now(self, request: bytes) -> None:
        """Send with one system call."""
        try:
            sent = self._socket.send(request, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent != len(request):
            raise OSError("no room for a request")

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        """Receive with one system call."""
        return self._socket.recvmsg_into(buffers[:IOV_LIMIT], 0, socket.MSG_DONTWAIT)[0]

    def is_idle(self) -> bool:
        """Poll."""
        return not self._poll.poll(0)

    def interrupt(self) -> None:
        """Shut the socket down."""
        shut_down(self._socket)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class TlsTransport:
    """A TLS socket: records of 16 KiB, decrypted straight into the buffers."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        """Take over a socket whose handshake is done."""
        self._socket = sock
        self._poll = _poll_of(sock)

    def set_timeout(self, seconds: float) -> None:
        """Use the timeout of the ssl module."""
        self._socket.settimeout(max(seconds, WAIT_LIMIT))

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send a piece of the first buffer."""
        return self._socket.send(buffers[0][:TLS_CHUNK])

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Receive one record's worth."""
        return self._socket.recv_into(buffers[0])

    def receive_some(self, buffer: memoryview) -> int:
        """Receive one record's worth."""
        return self._socket.recv_into(buffer)

    @property
    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def send_now(self, request: bytes) -> None:
        """Send one record."""
        self._socket.settimeout(0)
        if self._socket.send(request) != len(request):
            raise OSError("no room for a request")

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        """Decrypt the records that are there into the first buffer."""
        self._socket.settimeout(0)
        buffer, count = buffers[0], 0
        try:
            while count < len(buffer):
                got = self._socket.recv_into(buffer[count:])
                if got == 0:
                    break
                count += got
        except ssl.SSLWantReadError:
            if count == 0:
                raise BlockingIOError from None
        return count

    def is_idle(self) -> bool:
        """Poll below TLS: what comes between two responses is its end, or nothing to rely on."""
        return not self._poll.poll(0)

    def interrupt(self) -> None:
        """Shut the socket down below TLS."""
        shut_down(self._socket)

    def close(self) -> None:
        """Close the socket without a closing handshake, which could block."""
        self._socket.close()


def shut_down(sock: socket.socket) -> None:
    """End both directions, so that whoever waits for the socket in another thread wakes up."""
    with suppress(OSError):  # not SSLSocket's own, which is not made for a second thread
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _poll_of(sock: socket.socket) -> select.poll:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll


def connect(
    addresses: Sequence[Address],
    host: str,
    timeout: float,
    context: ssl.SSLContext | None = None,
) -> Transport:
    """Open a connection to the first address that takes one, TLS with a context.

    Raises `OSError`. `host` is what a certificate must name.
    """
    sock = open_socket(addresses, host, timeout, context)
    return TlsTransport(sock) if isinstance(sock, ssl.SSLSocket) else PlainTransport(sock)


def open_socket(
    addresses: Sequence[Address],
    host: str,
    timeout: float,
    context: ssl.SSLContext | None = None,
) -> socket.socket:
    """Open a connection likewise, and return its socket."""
    deadline = time.monotonic() + timeout
    sock = _connect_any(addresses, deadline)
    try:
        sock.settimeout(max(deadline - time.monotonic(), WAIT_LIMIT))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        if context is None:
            return sock
        _widen(sock)
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def keep_alive(sock: socket.socket) -> None:
    """Send probes while idle, so that no balancer or firewall on the way forgets the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _widen(sock: socket.socket) -> None:
    """Ask for the receive buffer that the kernel gives by itself to whoever reads much at once.

    It gives little to TLS, which reads a record of 16 KiB at a time. Where the system's limit for
    what is asked for is lower (212,992 on older kernels) the kernel's own choice is better.
    """
    with suppress(OSError):
        if int(_WINDOW_LIMIT.read_text()) >= TLS_WINDOW:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TLS_WINDOW)


def _connect_any(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """Try the addresses in order, each for its share of the time that is left."""
    failure = OSError("the host has no address")
    for left, (family, kind, number, address) in zip(
        range(len(addresses), 0, -1), addresses, strict=True
    ):
        sock = socket.socket(family, kind, number)
        try:
            sock.settimeout(max((deadline - time.monotonic()) / left, WAIT_LIMIT))
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure
