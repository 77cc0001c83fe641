"""The loop that receives pages, against a server that says what a test wants."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.minio.connection import Connection
from memkv_sglang.tiers.minio.endpoints import Endpoint
from memkv_sglang.tiers.minio.errors import OutOfTimeError, StallError
from memkv_sglang.tiers.minio.lanes import Request, Response, Source, receive
from memkv_sglang.tiers.minio.transport import PlainTransport

SIZE = 6000
CONTENT = bytes(range(250)) * (SIZE // 250)
KEY = make_chain(make_namespace(page_bytes=SIZE), 1).keys()[0]
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx: y\r\n\r\n" % SIZE + CONTENT

SERVER, IDLE = (Endpoint("http", host, 80, "/") for host in ("server", "idle"))

Serve = Callable[[socket.socket], None]
Start = Callable[[Serve], socket.socket]


pytestmark = pytest.mark.parametrize("beside", [False, True])


class Caller:
    """Asks for two pages over one connection."""

    def __init__(self, sock: socket.socket, stall_timeout: float = 20.0) -> None:
        self.connection = Connection(SERVER, PlainTransport(sock), stall_timeout)
        self.pages = [Page(KEY, (memoryview(bytearray(SIZE - 7)), memoryview(bytearray(7))))] * 2
        self.stopped = False
        self.responses: list[Response] = []
        self.requests: Iterator[Request] = (
            Request(number, page, b"GET / HTTP/1.1\r\n\r\n")
            for number, page in enumerate(self.pages)
        )
        self._stall_timeout = stall_timeout

    def receive(self, *, beside: bool = False, seconds: float = 30.0) -> None:
        """Receive by a thread that has nothing else to do, or another connection."""
        source = Source(self.take, self._stop, self.responses.append)
        deadline = time.monotonic() + seconds
        ours, theirs = socket.socketpair()
        with ours, theirs:
            idle = Connection(IDLE, PlainTransport(ours), self._stall_timeout)
            connections = [self.connection, idle] if beside else [self.connection]
            receive(connections, source, deadline, self._stall_timeout)

    def take(self, endpoint: Endpoint) -> Request | None:
        """Return the next request, for the server only."""
        return None if endpoint == IDLE else next(self.requests, None)

    def _stop(self) -> None:
        self.stopped = True
        self.requests = iter(())


@pytest.fixture
def serving() -> Iterator[Start]:
    """Start a server's end of a connection, return the client's."""
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def start(serve: Serve) -> socket.socket:
        ours, theirs = socket.socketpair()
        sockets.extend((ours, theirs))

        def run() -> None:
            with suppress(OSError):
                serve(theirs)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return ours

    yield start
    for sock in sockets:
        sock.close()
    for thread in threads:
        thread.join()


def answer(*responses: bytes) -> Serve:
    """Say one thing for each request."""

    def serve(sock: socket.socket) -> None:
        for response in responses:
            sock.recv(1000)
            sock.sendall(response)

    return serve


def test_pages_are_received(serving: Start, beside: bool) -> None:
    caller = Caller(serving(answer(GOOD, GOOD.lower().replace(b"http", b"HTTP"))))
    caller.receive(beside=beside)
    checksum = page_checksum(KEY, [memoryview(CONTENT)])
    assert [response.number for response in caller.responses] == [0, 1]
    assert caller.responses[0].checksum == checksum
    assert caller.responses[0].head == GOOD[: -SIZE - 2]
    assert b"".join(caller.pages[0].buffers) == CONTENT.lower()
    assert caller.connection.reusable
    assert not caller.stopped


def test_response_that_comes_in_pieces(serving: Start, beside: bool) -> None:
    def serve(sock: socket.socket) -> None:
        for _ in range(2):
            sock.recv(1000)
            for i in range(0, len(GOOD), 7):
                sock.sendall(GOOD[i : i + 7])

    caller = Caller(serving(serve))
    caller.receive(beside=beside)
    assert len(caller.responses) == 2
    assert b"".join(caller.pages[0].buffers) == CONTENT


@pytest.mark.parametrize(
    "response",
    [
        GOOD.replace(b"200 OK", b"404 Not Found"),
        GOOD.replace(b"200 OK", b"206 Partial Content"),
        GOOD.replace(b"Length: 6000", b"Length: 6001") + b"a",
        GOOD.replace(b"Length: 6000", b"Length: 5999")[:-1],
        GOOD.replace(b"Content-Length: 6000", b"Transfer-Encoding: chunked"),
        GOOD.replace(b"x: y", b"Transfer-Encoding: chunked"),
        GOOD.replace(b"x: y", b"content-length: 7000"),
        GOOD.replace(b"x: y", b"Connection: close"),
        GOOD.replace(b"x: y", b"x: " + bytes(5000)),
        GOOD[:-1],
        b"",
    ],
)
def test_anything_else_closes_the_connection(serving: Start, beside: bool, response: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(response)
        sock.shutdown(socket.SHUT_WR)

    caller = Caller(serving(serve))
    caller.receive(beside=beside)
    assert caller.responses == []
    assert caller.stopped
    assert not caller.connection.reusable


def test_refusal_that_is_read_keeps_the_connection(serving: Start, beside: bool) -> None:
    caller = Caller(serving(answer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")))
    caller.receive(beside=beside)
    assert caller.responses == []
    assert caller.stopped
    assert caller.connection.reusable


def test_second_answer_to_one_request_closes_the_connection(serving: Start, beside: bool) -> None:
    """Each request would get the answer of the one before."""
    both = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GOOD[:-1])
        sock.sendall(GOOD[-1:] + GOOD)
        both.set()

    sock = serving(serve)
    caller = Caller(sock)
    take = caller.take

    def take_late(endpoint: Endpoint) -> Request | None:
        if caller.responses:
            both.wait()
        return take(endpoint)

    caller.take = take_late  # type: ignore[method-assign]
    caller.receive(beside=beside)
    assert len(caller.responses) == 1
    assert not caller.connection.reusable


def test_deadline_while_bytes_keep_coming(serving: Start, beside: bool) -> None:
    def serve(sock: socket.socket) -> None:
        while sock.recv(1000):
            sock.sendall(GOOD)

    caller = Caller(serving(serve))
    endless = Request(0, caller.pages[0], b"GET / HTTP/1.1\r\n\r\n")
    caller.requests = itertools.repeat(endless)
    with pytest.raises(OutOfTimeError):
        caller.receive(beside=beside, seconds=0.3)


@pytest.mark.parametrize("sent", [0, 10, len(GOOD) - 1])
def test_server_that_stalls(serving: Start, beside: bool, sent: int) -> None:
    end = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GOOD[:sent])
        end.wait(30)

    caller = Caller(serving(serve), stall_timeout=0.2)
    with pytest.raises(StallError):
        caller.receive(beside=beside)
    end.set()
    assert caller.connection.stalled
    assert not caller.connection.reusable
