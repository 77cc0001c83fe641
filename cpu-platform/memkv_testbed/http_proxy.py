"""An HTTP proxy that fails as object stores do: in the status, the head or the body.

Requests cross two real sockets, so a client sees what a failing server, load balancer or network
would show. For faults below HTTP, see `tcp_proxy`.
"""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal, NamedTuple, Self

PIECE = 16 << 10
"""Bytes of a body that are forwarded at once."""

WAIT = 0.02
"""Seconds between checks whether the fault was removed."""


class HttpFault(NamedTuple):
    """What happens to each exchange. Without any field set, nothing does."""

    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    """Methods of the requests that the fault strikes."""
    answer: bytes | None = None
    """Response to send after reading the request, which is then not forwarded."""
    matching: bytes = b""
    """Regular expression. The fault strikes only requests whose first line contains a match."""
    every: int = 1
    """The fault strikes one in this many of these requests."""
    drip: float | None = None
    """Seconds to wait before each byte of a response's body."""
    rate: int | None = None
    """Bytes per second of the bodies of all connections together."""
    cut: Literal["stall", "reset", "close"] | None = None
    """What the proxy does in the middle of a body, in either direction."""
    edit_request: Callable[[bytes], bytes] | None = None
    """Function that changes a request's head."""
    edit_response: Callable[[bytes], bytes] | None = None
    """Function that changes a response's head."""
    edit_content: Callable[[bytes], bytes] | None = None
    """Function that changes each piece of a response's body, but not its length."""
    surplus: bytes = b""
    """Bytes to send after each response's body."""


NO_FAULT = HttpFault()


class _Cut(Exception):  # noqa: N818 - intended, not an error
    """The fault ends the connection."""


class HttpFaultProxy:
    """A context manager that forwards requests on a free loopback port to a server.

    `fault` may be set at any time. Bodies in transfer continue when it is removed.
    """

    def __init__(self, host: str, port: int) -> None:
        """Listen. For each client connection, the proxy connects to the server once."""
        self.fault = NO_FAULT
        self.requests = 0
        """Number of requests received, including those that were not forwarded."""
        self._met = 0
        self._target = (host, port)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._line = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._spawning = threading.Lock()
        self.port = 0
        self.listen()

    @property
    def url(self) -> str:
        """URL of the proxy."""
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        """Accept connections; after `refuse`, on the same port again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._spawn(self._accept, self._listener)

    def refuse(self) -> None:
        """Close every connection and let the kernel refuse new ones."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close everything and wait for the threads."""
        self._closed.set()
        self.refuse()
        while self._threads:
            with contextlib.suppress(KeyError):
                with self._spawning:  # every thread in the set has been started
                    thread = self._threads.pop()
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spawn(self, target: Callable[[socket.socket], None], sock: socket.socket) -> None:
        def run() -> None:
            target(sock)
            self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="http-proxy", daemon=True)
        with self._spawning:
            self._threads.add(thread)
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                self._spawn(self._serve, listener.accept()[0])

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket() as server:
            with self._lock:
                self._open |= {client, server}
                if self._closed.is_set():  # `refuse` has closed only the sockets before these
                    return
            with contextlib.suppress(OSError, ValueError, _Cut):
                server.connect(self._target)
                for sock in (client, server):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with client.makefile("rb") as requests, server.makefile("rb") as responses:
                    while head := _read_head(requests):
                        self._exchange(head, client, server, requests, responses)
            with self._lock:
                self._open -= {client, server}

    def _exchange(
        self,
        head: bytes,
        client: socket.socket,
        server: socket.socket,
        requests: BinaryIO,
        responses: BinaryIO,
    ) -> None:
        self.requests += 1
        method = head.split(b" ", 1)[0].decode()
        fault = self._fault_for(head, method)
        body = _body(requests, head)
        if fault.answer is not None:
            for _ in body:
                pass
            client.sendall(fault.answer)
            return
        server.sendall(fault.edit_request(head) if fault.edit_request else head)
        self._pass_on(body, server, client, fault)
        answer = _read_head(responses)
        if not answer:
            raise _Cut
        client.sendall(fault.edit_response(answer) if fault.edit_response else answer)
        content = _answer_body(method, answer, responses)
        if fault.edit_content:
            content = map(fault.edit_content, content)
        if fault.drip:
            content = self._drip(content, fault)
        self._pass_on(content, client, client, fault)
        client.sendall(fault.surplus)

    def _fault_for(self, head: bytes, method: str) -> HttpFault:
        """Return the fault if it strikes this request."""
        fault = self.fault
        if method not in fault.methods:
            return NO_FAULT
        if not re.search(fault.matching, head.split(b"\r\n", 1)[0]):
            return NO_FAULT
        with self._lock:
            self._met += 1
            return fault if self._met % fault.every == 0 else NO_FAULT

    def _drip(self, body: Iterator[bytes], fault: HttpFault) -> Iterator[bytes]:
        """Yield single bytes with a pause before each, until the fault is removed."""
        for piece in body:
            for at in range(len(piece)):
                if self.fault is not fault or self._closed.wait(fault.drip):
                    yield piece[at:]
                    break
                yield piece[at : at + 1]

    def _pass_on(
        self, body: Iterator[bytes], sink: socket.socket, client: socket.socket, fault: HttpFault
    ) -> None:
        for piece in body:
            if fault.cut and len(piece) > 1:
                half = len(piece) // 2
                sink.sendall(piece[:half])
                self._cut(client, fault)
                piece = piece[half:]
            if fault.rate:
                with self._line:
                    if self.fault is fault:  # the fault may have changed since the earlier pieces
                        self._closed.wait(len(piece) / fault.rate)
            sink.sendall(piece)

    def _cut(self, client: socket.socket, fault: HttpFault) -> None:
        """End the connection, or stall it until the fault is removed."""
        while fault.cut == "stall":
            if self.fault is not fault or self._closed.wait(WAIT):
                return
        if fault.cut == "reset":  # With this option, closing sends RST instead of FIN.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Cut


def _read_head(stream: BinaryIO) -> bytes:
    """Return a head with its final empty line; empty at the end of the stream."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b""
        head += line
    return head


def header(head: bytes, name: bytes) -> bytes:
    """Return the value of a header field; empty if it is missing."""
    for line in head.split(b"\r\n")[1:]:
        field, _, value = line.partition(b":")
        if field.lower() == name:
            return value.strip()
    return b""


def _body(stream: BinaryIO, head: bytes) -> Iterator[bytes]:
    if header(head, b"transfer-encoding").lower() == b"chunked":
        yield from _chunks(stream)
        return
    left = int(header(head, b"content-length") or b"0")
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise _Cut
        left -= len(piece)
        yield piece


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield a chunked body unchanged, including its framing."""
    while True:
        line = stream.readline()
        rest = stream.read(int(line.split(b";")[0], 16) + 2)
        yield line + rest
        if len(rest) == 2:
            return


def _answer_body(method: str, head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    bodiless = method == "HEAD" or head.split(b" ", 2)[1] in (b"204", b"304")
    return iter(()) if bodiless else _body(stream, head)
