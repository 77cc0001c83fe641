"""A TCP proxy that cuts connections, stalls them, drips their bytes or slows them down.

Bytes cross two real sockets, so each side sees what a failing network would show.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

CHUNK = 64 << 10

DRIP = 0.02
"""Seconds between two dripped bytes."""


class Fault(NamedTuple):
    """A fault that strikes each connection after a number of further bytes in one direction."""

    action: Literal["close", "reset", "stall", "drip"]
    after: int = 0
    direction: Literal["request", "response"] = "response"
    once: bool = False
    """Whether the fault is removed after it has struck once."""


class TcpProxy:
    """A context manager that forwards connections on a free loopback port to a server.

    `fault`, `reply` and `rate` may be set at any time and apply to open connections too. A stalled
    or dripping connection continues when its fault is removed. With a `reply`, nothing is
    forwarded: the proxy sends it whenever bytes arrive. `rate` limits the bytes per second of all
    responses together.
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen. For each client connection, the proxy connects to the server once."""
        self.fault: Fault | None = None
        self.reply: bytes | None = None
        self.rate: float | None = None
        self.accepted = 0
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._forgotten: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._line_is_free = 0.0
        self._spawn(self._accept)

    @property
    def url(self) -> str:
        """URL of the proxy, for a server that speaks http."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """Number of open client connections."""
        with self._lock:
            return len(self._open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drop_connections(self) -> None:
        """Close every connection, as servers close idle ones."""
        with self._lock:
            for client in self._open:
                _shut(client)

    def forget_connections(self) -> None:
        """Discard all further bytes of open connections, like a load balancer that forgot them.

        Neither side notices. New connections work.
        """
        with self._lock:
            self._forgotten |= self._open

    def close(self) -> None:
        """Close everything and wait for the threads. Idempotent."""
        self._closed.set()
        _shut(self._listener)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join()

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)  # only started threads, because `close` joins them

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.accepted += 1
                self._open.add(client)
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket() as server:
            with contextlib.suppress(OSError):
                server.connect(self._target)
                self._forward(client, server)
            with self._lock:
                self._open.discard(client)
                self._forgotten.discard(client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        """Forward in both directions until one side ends.

        One thread does both, so that a reset is passed on at once.
        """
        sinks = {client: ("request", server), server: ("response", client)}
        fault, room = None, 0
        while True:
            for source in select.select([client, server], [], [])[0]:
                data = source.recv(CHUNK)
                if not data:
                    return
                if client in self._forgotten:
                    continue
                direction, sink = sinks[source]
                if self.rate is not None and direction == "response":
                    self._take_the_line(len(data) / self.rate)
                if source is client and self.reply is not None:
                    client.sendall(self.reply)
                    continue
                if self.fault is not fault:
                    fault = self.fault
                    room = fault.after if fault else 0
                if fault is not None and fault.direction == direction:
                    sink.sendall(data[:room])
                    if len(data) > room and not self._survives(fault, data[room:], client, sink):
                        return
                    room = max(room - len(data), 0)
                else:
                    sink.sendall(data)

    def _take_the_line(self, seconds: float) -> None:
        """Wait until earlier bytes, and these, would have crossed a line of this rate."""
        with self._lock:
            self._line_is_free = max(time.monotonic(), self._line_is_free) + seconds
            wait = self._line_is_free - time.monotonic()
        self._closed.wait(wait)

    def _survives(
        self, fault: Fault, rest: bytes, client: socket.socket, sink: socket.socket
    ) -> bool:
        """Apply the fault; return False if it ends the connection.

        Stalled or dripping bytes are sent when the fault is removed.
        """
        if fault.once:
            self.fault = None
        if fault.action == "reset":  # With this option, closing sends RST instead of FIN.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault.action in ("close", "reset"):
            return False
        while self.fault is fault and not self._closed.wait(DRIP):
            if fault.action == "drip" and rest:
                sink.sendall(rest[:1])
                rest = rest[1:]
        sink.sendall(rest)
        return True


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
