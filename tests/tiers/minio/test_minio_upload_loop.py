"""The compiled loop sends pages to a scripted server."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import pytest

from memkv_sglang.encryption.sealing import CONTEXT, OVERHEAD, unseal
from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.minio.http import BulkTemplate, Connection, Endpoint, Request, Sealing
from memkv_sglang.tiers.minio.http.errors import OutOfTimeError, StallError
from memkv_sglang.tiers.minio.http.transport import PlainTransport

loop = pytest.importorskip(
    "memkv_sglang.tiers.minio.http.bulk_loop",
    reason="not compiled: needs a C compiler with Python's headers",
    exc_type=ImportError,
)
bulk_batch = pytest.importorskip("memkv_sglang.tiers.minio.http.bulk_batch", exc_type=ImportError)

LENGTHS = (7000, 1, 2999)
SIZE = sum(LENGTHS)
LARGE = (3 << 20, 5 << 20)
"""Buffers of a page that no socket buffer holds."""

KEYS = make_chain(make_namespace(page_bytes=SIZE), 2).keys()
SERVER = Endpoint("http", "server", 80, "/")
STORED = b'HTTP/1.1 200 OK\r\nETag: "0123"\r\nContent-Length: 0\r\n\r\n'
MASTER = bytes(range(32))

Serve = Callable[[socket.socket], None]
Start = Callable[[Serve], socket.socket]


def template(size: int) -> BulkTemplate:
    lines = b"content-length: %d\r\nx-checksum: " % size
    return BulkTemplate(b"PUT /", b"", b"", b"key", lines, lines_end=b"\r\nauthorization: ")


class Caller:
    """Sends two pages over one connection."""

    def __init__(
        self, sock: socket.socket, lengths: Sequence[int] = LENGTHS, stall_timeout: float = 20.0
    ) -> None:
        self.connection = Connection(SERVER, PlainTransport(sock), stall_timeout)
        self.pages = [make_page(key, lengths, filled=True) for key in KEYS]
        self.reasons: list[str] = []
        self.stored: list[bool] = []
        self.started = -1
        self._size = sum(lengths)
        self._stall_timeout = stall_timeout

    def send(self, seconds: float = 30.0, sealing: Sealing | None = None) -> None:
        """Send in this thread."""
        size = self._size + (OVERHEAD if sealing else 0)
        batch = bulk_batch.Upload(
            [Request(b"page", page) for page in self.pages],
            {SERVER: template(size)},
            self.reasons.append,
            length=self._size,
            sealing=sealing,
            memory=[bytearray(size)],
        )
        deadline = time.monotonic() + seconds
        try:
            loop.transfer([self.connection], batch, deadline, self._stall_timeout)
        finally:
            batch.close()
            self.stored, self.started = batch.stored(), batch.started


@pytest.fixture
def serving() -> Iterator[Start]:
    """Start the server's end of a connection; return the client's end."""
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def start(serve: Serve) -> socket.socket:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
        sockets.extend((ours, theirs))

        def run() -> None:
            with suppress(OSError):
                serve(theirs)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return ours

    yield start
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # ends threads that are blocked on it
        sock.close()
    for thread in threads:
        thread.join()


def receive_request(sock: socket.socket, pause: float = 0.0) -> tuple[bytes, bytes]:
    """Return the head and the body of a request; pause after each MiB."""
    received = bytearray()
    while b"\r\n\r\n" not in received:
        received += sock.recv(1 << 16) or _end()
    head = bytes(received).partition(b"\r\n\r\n")[0]
    found = re.search(rb"content-length: (\d+)", head)
    assert found is not None
    body = received[len(head) + 4 :]
    while left := int(found[1]) - len(body):
        body += sock.recv(min(left, 1 << 20), socket.MSG_WAITALL) or _end()
        time.sleep(pause)
    return head, bytes(body)


def _end() -> bytes:
    raise OSError("the client closed the connection")


class Server:
    """Answers requests with scripted responses; keeps the requests."""

    def __init__(self, *responses: bytes) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self._responses = responses

    def __call__(self, sock: socket.socket) -> None:
        for response in self._responses:
            self.requests.append(receive_request(sock))
            sock.sendall(response)


@pytest.mark.parametrize("lengths", [LENGTHS, [0, SIZE, 0], [1] * 1500, LARGE])
def test_pages_are_sent_with_their_checksums(serving: Start, lengths: Sequence[int]) -> None:
    server = Server(STORED, STORED.replace(b"ETag", b"etag"))
    caller = Caller(serving(server), lengths)
    caller.send()
    assert caller.stored == [True, True]
    assert caller.started == 2
    assert caller.connection.reusable
    assert caller.reasons == []
    for page, (head, body) in zip(caller.pages, server.requests, strict=True):
        assert body == b"".join(page.buffers)
        checksum = page_checksum(page.key, page.buffers).hex().encode()
        assert b"\r\nx-checksum: " + checksum + b"\r\nauthorization: " in head


class GilTransport:
    """Like a TLS transport, which the loop calls with the GIL."""

    def __init__(self, sock: socket.socket) -> None:
        self._plain = PlainTransport(sock)

    def __getattr__(self, name: str) -> object:
        return getattr(self._plain, name)


@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
def test_transport_that_needs_the_gil(serving: Start, lengths: Sequence[int]) -> None:
    server = Server(STORED, STORED)
    sock = serving(server)
    caller = Caller(sock, lengths)
    caller.connection.transport = GilTransport(sock)  # type: ignore[assignment]
    caller.send()
    assert caller.stored == [True, True]
    assert [body for _, body in server.requests] == [b"".join(p.buffers) for p in caller.pages]


def test_response_in_pieces(serving: Start) -> None:
    def serve(sock: socket.socket) -> None:
        for _ in range(2):
            receive_request(sock)
            for i in range(len(STORED)):
                sock.sendall(STORED[i : i + 1])

    caller = Caller(serving(serve))
    caller.send()
    assert caller.stored == [True, True]


def test_server_that_reads_slowly(serving: Start) -> None:
    """As long as bytes move, nothing has stalled."""
    server = Server(STORED, STORED)

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        server(sock)

    caller = Caller(serving(serve), LARGE)
    caller.send()
    assert caller.stored == [True, True]
    assert [body for _, body in server.requests] == [b"".join(p.buffers) for p in caller.pages]


@pytest.mark.parametrize(
    ("reason", "response"),
    [
        ("status", b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"),
        ("status", b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n"),
        ("status", b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"),
        ("status", b"HTTP/1.1 503 Slow Down\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n"),
        ("status", STORED.replace(b"200 OK", b"204 No Content")),
        ("malformed", STORED.replace(b"ETag", b"x")),
        ("malformed", STORED.replace(b'"0123"', b"")),
        ("malformed", STORED.replace(b"\r\n\r\n", b'\r\nETag: "4567"\r\n\r\n')),
        ("malformed", b"SSH-2.0-OpenSSH\r\n\r\n"),
        ("malformed", b"HTTP/1.1 200 OK\r\nx: " + bytes(5000)),
        ("length", STORED.replace(b"Length: 0", b"Length: 2") + b"ok"),
        ("length", STORED + b"x"),
        ("framing", STORED.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")),
        ("interim", b"HTTP/1.1 100 Continue\r\n\r\n" + STORED),
        ("close", STORED.replace(b"ETag", b"Connection: close\r\nETag")),
        ("close", STORED[:-2]),
        ("close", b""),
    ],
)
def test_other_responses_are_left_to_the_slow_path(
    serving: Start, reason: str, response: bytes
) -> None:
    def serve(sock: socket.socket) -> None:
        server(sock)
        sock.shutdown(socket.SHUT_WR)

    server = Server(response)
    caller = Caller(serving(serve))
    caller.send()
    assert caller.stored == [False, False]
    assert caller.reasons == [reason]
    assert caller.started == 1, "the second page was not sent"
    assert not caller.connection.reusable


@pytest.mark.parametrize("etag", [b"0123", b'""', b'W/"0123"'])
def test_unusual_etags_confirm_a_stored_page(serving: Start, etag: bytes) -> None:
    response = STORED.replace(b'"0123"', etag)
    caller = Caller(serving(Server(response, response)))
    caller.send()
    assert caller.stored == [True, True]
    assert caller.connection.reusable


def test_second_answer_to_one_request_closes_the_connection(serving: Start) -> None:
    """Otherwise, each page would get the response of the one before it."""

    def serve(sock: socket.socket) -> None:
        receive_request(sock)
        sock.sendall(STORED[:-1])
        sock.sendall(STORED[-1:] + STORED)  # both arrive at once

    caller = Caller(serving(serve))
    caller.send()
    assert caller.stored in ([False, False], [True, False])
    assert caller.reasons in (["length"], ["malformed"])
    assert not caller.connection.reusable


@pytest.mark.parametrize(
    ("reason", "response"),
    [
        ("malformed", STORED),
        ("interim", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("status", b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"),
        (
            "status",
            b"HTTP/1.1 307 Go\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
        ),
    ],
)
def test_response_before_the_page_was_sent(serving: Start, reason: str, response: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(response)
        end.wait(30)

    end = threading.Event()
    caller = Caller(serving(serve), LARGE)
    caller.send()
    end.set()
    assert caller.stored == [False, False]
    assert caller.reasons == [reason]
    assert not caller.connection.reusable


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("read", [0, 1000, 6 << 20])
def test_connection_that_ends_while_a_page_is_sent(
    serving: Start, read: int, reused: bool, reset: bool
) -> None:
    def serve(sock: socket.socket) -> None:
        left = read
        while left > 0:
            left -= len(sock.recv(min(left, 1 << 16)))
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    caller = Caller(serving(serve), LARGE)
    caller.connection.reused = reused
    caller.send()
    assert caller.stored == [False, False]
    assert len(caller.reasons) == 1
    assert caller.reasons[0] in ("close", "stale")
    assert not caller.connection.reusable


def test_page_that_changed_is_not_sent(serving: Start) -> None:
    server = Server(STORED)
    caller = Caller(serving(server))
    caller.pages[1] = caller.pages[1]._replace(checksum=bytes(16))
    caller.pages[0] = caller.pages[0]._replace(
        checksum=page_checksum(KEYS[0], caller.pages[0].buffers)
    )
    caller.send()
    assert caller.stored == [True, False]
    assert caller.reasons == ["changed"]
    assert caller.connection.reusable
    assert len(server.requests) == 1


@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
@pytest.mark.parametrize("reads", [False, True])
def test_server_that_stalls(serving: Start, lengths: Sequence[int], reads: bool) -> None:
    end = threading.Event()

    def serve(sock: socket.socket) -> None:
        if reads:
            receive_request(sock)
        end.wait(30)

    caller = Caller(serving(serve), lengths, stall_timeout=0.3)
    with pytest.raises(StallError):
        caller.send()
    end.set()
    assert caller.stored == [False, False]
    assert caller.connection.stalled
    assert not caller.connection.reusable
    for buffer in (buffer for page in caller.pages for buffer in page.buffers):
        buffer.release()  # nothing refers to it any more


def test_deadline_while_bytes_keep_moving(serving: Start) -> None:
    def serve(sock: socket.socket) -> None:
        while sock.recv(1000):
            time.sleep(0.01)

    caller = Caller(serving(serve), LARGE)
    begin = time.monotonic()
    with pytest.raises(OutOfTimeError):
        caller.send(seconds=0.3)
    assert time.monotonic() - begin < 10
    assert caller.stored == [False, False]
    assert not caller.connection.reusable


def test_silent_reused_connection_is_dropped_for_a_fresh_one(serving: Start) -> None:
    """A load balancer may have forgotten it. Half of the time is left for the slow path."""
    end = threading.Event()

    def serve(sock: socket.socket) -> None:
        end.wait(30)

    caller = Caller(serving(serve))
    caller.connection.reused = True
    caller.connection.idle_since = time.monotonic() - 10
    begin = time.monotonic()
    caller.send(seconds=10)
    end.set()
    assert time.monotonic() - begin < 9
    assert caller.reasons == ["stale"]
    assert caller.connection.stale


def test_slow_upload_on_a_reused_connection_is_not_taken_for_silence(serving: Start) -> None:
    """The server's kernel acknowledges bytes, so the connection is alive."""
    server, patience = Server(STORED), 1.0

    def serve(sock: socket.socket) -> None:
        receive_request(sock, pause=patience / 4)  # 2 s for a page
        sock.sendall(STORED)
        server(sock)

    caller = Caller(serving(serve), LARGE)
    caller.connection.reused = True
    caller.connection.idle_since = time.monotonic() - 10
    caller.connection.patience = lambda deadline: patience  # type: ignore[method-assign]
    caller.send()
    assert caller.stored == [True, True]
    assert not caller.connection.stale


def test_read_only_memory(serving: Start) -> None:
    server = Server(STORED, STORED)
    caller = Caller(serving(server))
    caller.pages = [
        Page(page.key, tuple(memoryview(bytes(buffer)) for buffer in page.buffers))
        for page in caller.pages
    ]
    caller.send()
    assert caller.stored == [True, True]


@pytest.mark.parametrize("difference", [-1, 1])
def test_page_of_another_length_is_not_sent(serving: Start, difference: int) -> None:
    """The server would take its end for the next request, or wait for more."""
    server = Server(STORED)
    caller = Caller(serving(server))
    caller.pages[1] = make_page(KEYS[1], [SIZE + difference], filled=True)
    caller.send()
    assert caller.stored == [True]
    assert caller.connection.reusable


@pytest.mark.parametrize("lengths", [LENGTHS, LARGE])
def test_encrypted_pages(serving: Start, lengths: Sequence[int]) -> None:
    server = Server(STORED, STORED)
    caller = Caller(serving(server), lengths)
    caller.send(sealing=Sealing({}, CONTEXT, MASTER))
    assert caller.stored == [True, True]
    for page, (head, body) in zip(caller.pages, server.requests, strict=True):
        sealed = memoryview(body)
        target = make_page(page.key, lengths, filled=False)
        assert unseal(MASTER, sealed, target) == page_checksum(page.key, page.buffers)
        assert holds_content(target)
        assert page_checksum(page.key, [sealed]).hex().encode() in head
    nonces = {body[:12] for _, body in server.requests}
    assert len(nonces) == 2


def test_encrypted_page_that_changed_is_not_sent(serving: Start) -> None:
    caller = Caller(serving(Server()))
    caller.pages[0] = caller.pages[0]._replace(checksum=bytes(16))
    caller.send(sealing=Sealing({}, CONTEXT, MASTER))
    assert caller.stored == [False, False]
    assert caller.reasons == ["changed"]
