"""Send and receive bytes on a connected socket, plain or TLS, with a timeout per call."""

import select
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from typing_extensions import override

from memkv_sglang.tiers.minio.http.addresses import Address

Socket = TypeVar("Socket", bound=socket.socket)

IOV_LIMIT = 512
"""Maximum buffers per system call. The kernel accepts 1024."""

TLS_WINDOW = 4 << 20
"""Bytes to request for a TLS connection's receive buffer. The kernel doubles them."""

_WINDOW_LIMIT = Path("/proc/sys/net/core/rmem_max")

TLS_CHUNK = 256 << 10
"""Maximum bytes of one TLS write. It is small, so that a slow transfer does not look stalled."""

WAIT_LIMIT = 1e-3
"""Minimum timeout in seconds. 0 would mean no timeout."""


KEEP_ALIVE = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
}
"""Seconds before the first probe and between probes, and number of lost probes that end a
connection."""


class Transport(Protocol):
    """A connected stream. Calls raise `OSError`, and `TimeoutError` after the timeout."""

    def set_timeout(self, seconds: float) -> None:
        """Set the timeout of each following call."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send from the buffers in order; return the number of bytes sent (at least 1)."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Receive into the buffers in order; return the number of bytes, which is 0 at the end."""

    def receive_some(self, buffer: memoryview) -> int:
        """Receive as soon as any bytes arrive; return their number, which is 0 at the end."""

    @property
    def fileno(self) -> int:
        """The socket's descriptor, for `poll`."""

    def send_now(self, data: memoryview) -> int:
        """Send what fits the send buffer; return the number of bytes.

        Does not block: raises `BlockingIOError` if nothing fits. The next call must send the same
        data then, or data that begins with it.
        """

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        """Receive the bytes that have arrived into the buffers in order; 0 at the end.

        Does not block: raises `BlockingIOError` if nothing has arrived. If the first buffer was not
        filled, `poll` reports all further bytes.
        """

    def is_idle(self) -> bool:
        """Return whether there are no unread bytes and the peer has not closed. Does not block."""

    def interrupt(self) -> None:
        """Abort the call that another thread is blocked in."""

    def close(self) -> None:
        """Close the socket."""


class _SocketTransport(Generic[Socket]):
    """The common part of plain and TLS sockets."""

    def __init__(self, sock: Socket) -> None:
        """Take ownership of a connected socket."""
        self._socket = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @property
    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def is_idle(self) -> bool:
        """Poll the socket. Between two responses, only the end of the stream may arrive."""
        return not self._poll.poll(0)

    def interrupt(self) -> None:
        """Shut the socket down."""
        shut_down(self._socket)

    def close(self) -> None:
        """Close the socket. With TLS, skip the closing handshake, which could block."""
        self._socket.close()


class PlainTransport(_SocketTransport[socket.socket]):
    """A blocking socket with kernel timeouts: `MSG_WAITALL` fills a page in one system call.

    With a Python timeout, the socket would be non-blocking, and calls would return few bytes.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take ownership of a connected socket."""
        sock.settimeout(None)
        super().__init__(sock)
        self._timeout = 0.0

    def set_timeout(self, seconds: float) -> None:
        """Set `SO_RCVTIMEO` and `SO_SNDTIMEO`, which limit the total time of a call."""
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
        """Receive with one system call."""
        try:
            return self._socket.recv_into(buffer)
        except BlockingIOError as error:
            raise TimeoutError from error

    def send_now(self, data: memoryview) -> int:
        """Send with one system call."""
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        """Receive with one system call."""
        return self._socket.recvmsg_into(buffers[:IOV_LIMIT], 0, socket.MSG_DONTWAIT)[0]


class TlsTransport(_SocketTransport[ssl.SSLSocket]):
    """A TLS socket after its handshake. Decrypts records of 16 KiB into the buffers."""

    @override
    def is_idle(self) -> bool:
        """Poll the socket, and read what is no data: servers send session tickets (TLS 1.3)."""
        if super().is_idle():
            return True
        self._socket.settimeout(0)
        try:
            self._socket.recv(1)
        except ssl.SSLWantReadError:
            return True
        except OSError:
            pass
        return False

    def set_timeout(self, seconds: float) -> None:
        """Use the timeout of the ssl module."""
        self._socket.settimeout(max(seconds, WAIT_LIMIT))

    def send(self, buffers: Sequence[memoryview]) -> int:
        """Send a piece of the first buffer."""
        return self._socket.send(buffers[0][:TLS_CHUNK])

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Receive one record."""
        return self._socket.recv_into(buffers[0])

    def receive_some(self, buffer: memoryview) -> int:
        """Receive one record."""
        return self._socket.recv_into(buffer)

    def send_now(self, data: memoryview) -> int:
        """Send records of 16 KiB, either all or none."""
        self._socket.settimeout(0)
        try:
            return self._socket.send(data)
        except ssl.SSLWantWriteError:
            raise BlockingIOError from None

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        """Decrypt the records that have arrived into the first buffer."""
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


def shut_down(sock: socket.socket) -> None:
    """Shut down both directions, which wakes threads that are blocked on the socket."""
    with suppress(OSError):  # SSLSocket.shutdown is not thread-safe
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def connect(
    addresses: Sequence[Address],
    host: str,
    timeout: float,
    context: ssl.SSLContext | None = None,
) -> Transport:
    """Connect to the first reachable address. Uses TLS if there is a context.

    `host` is the name that the certificate must have. Raises `OSError`.
    """
    sock = open_socket(addresses, host, timeout, context)
    return TlsTransport(sock) if isinstance(sock, ssl.SSLSocket) else PlainTransport(sock)


def open_socket(
    addresses: Sequence[Address],
    host: str,
    timeout: float,
    context: ssl.SSLContext | None = None,
) -> socket.socket:
    """Connect like `connect`, but return the socket."""
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
    """Probe the connection while it is idle, so that load balancers and firewalls keep it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _widen(sock: socket.socket) -> None:
    """Request a large receive buffer.

    The kernel gives large buffers only to sockets that read a lot at once, but TLS reads records of
    16 KiB. If the system's limit is lower (212,992 bytes on older kernels), the default is better.
    """
    with suppress(OSError):
        if int(_WINDOW_LIMIT.read_text()) >= TLS_WINDOW:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TLS_WINDOW)


def _connect_any(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """Try the addresses in order. Each gets an equal share of the remaining time."""
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
