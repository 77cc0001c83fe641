"""The compiled loop receives pages from a scripted server."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress

import pytest

from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.minio.http.bulk import BulkTemplate, Metadata, Request, Response
from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.http.endpoints import Endpoint
from memkv_sglang.tiers.minio.http.errors import OutOfTimeError, StallError
from memkv_sglang.tiers.minio.http.transport import PlainTransport

loop = pytest.importorskip(
    "memkv_sglang.tiers.minio.http.bulk_loop",
    reason="not compiled: needs a C compiler with Python's headers",
    exc_type=ImportError,
)

bulk_batch = pytest.importorskip("memkv_sglang.tiers.minio.http.bulk_batch", exc_type=ImportError)

SIZE = 6000
CONTENT = bytes(range(250)) * (SIZE // 250)
KEY = make_chain(make_namespace(page_bytes=SIZE), 1).keys()[0]
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nx: y\r\n\r\n" % SIZE + CONTENT

TEMPLATE = BulkTemplate(b"GET /", b"", b"", b"key", b"authorization: ")
METADATA = Metadata(
    b"\r\nx-amz-meta-", (), b"\r\nx-amz-meta-length: ", b"\r\nx-amz-meta-checksum: "
)

SERVER, IDLE = (Endpoint("http", host, 80, "/") for host in ("server", "idle"))

Serve = Callable[[socket.socket], None]
Start = Callable[[Serve], socket.socket]


pytestmark = pytest.mark.parametrize("with_idle", [False, True])


class Caller:
    """Requests two pages over one connection."""

    def __init__(
        self,
        sock: socket.socket,
        stall_timeout: float = 20.0,
        lengths: Sequence[int] = (SIZE - 7, 7),
    ) -> None:
        self.sock = sock
        self.connection = Connection(SERVER, PlainTransport(sock), stall_timeout)
        buffers = tuple(memoryview(bytearray(length)) for length in lengths)
        self.pages = [Page(KEY, buffers)] * 2
        self.reasons: list[str] = []
        self.responses: list[Response] = []
        self._stall_timeout = stall_timeout

    def receive(self, *, with_idle: bool = False, seconds: float = 30.0) -> None:
        """Receive in a thread with this connection only, or with an idle one as well."""
        requests = [Request(b"page", page) for page in self.pages]
        batch = bulk_batch.Download(requests, {SERVER: TEMPLATE}, METADATA, self.reasons.append)
        deadline = time.monotonic() + seconds
        ours, theirs = socket.socketpair()
        # A closed peer does not matter while no request is in flight.
        theirs.shutdown(socket.SHUT_WR)
        with ours, theirs:
            idle = Connection(IDLE, PlainTransport(ours), self._stall_timeout)
            connections = [self.connection, idle] if with_idle else [self.connection]
            try:
                loop.transfer(connections, batch, deadline, self._stall_timeout)
            finally:
                batch.close()
                self.responses = batch.unverified()


@pytest.fixture
def serving() -> Iterator[Start]:
    """Start the server's end of a connection; return the client's end."""
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
    """Send one response per request."""

    def serve(sock: socket.socket) -> None:
        for response in responses:
            sock.recv(1000)
            sock.sendall(response)

    return serve


def test_pages_are_received(serving: Start, with_idle: bool) -> None:
    caller = Caller(serving(answer(GOOD, GOOD.lower().replace(b"http", b"HTTP"))))
    caller.receive(with_idle=with_idle)
    checksum = page_checksum(KEY, [memoryview(CONTENT)])
    assert [response.number for response in caller.responses] == [0, 1]
    assert caller.responses[0].checksum == checksum
    assert caller.responses[0].head == GOOD[: -SIZE - 2]
    assert b"".join(caller.pages[0].buffers) == CONTENT.lower()
    assert caller.connection.reusable
    assert caller.reasons == []


def test_response_that_comes_in_pieces(serving: Start, with_idle: bool) -> None:
    def serve(sock: socket.socket) -> None:
        for _ in range(2):
            sock.recv(1000)
            for i in range(0, len(GOOD), 7):
                sock.sendall(GOOD[i : i + 7])

    caller = Caller(serving(serve))
    caller.receive(with_idle=with_idle)
    assert len(caller.responses) == 2
    assert b"".join(caller.pages[0].buffers) == CONTENT


@pytest.mark.parametrize("lengths", [[0, *[1] * SIZE, 0], [0, SIZE], [1] * 3 + [SIZE - 3]])
def test_buffers_of_any_number_and_length(
    serving: Start, with_idle: bool, lengths: list[int]
) -> None:
    caller = Caller(serving(answer(GOOD, GOOD)), lengths=lengths)
    caller.receive(with_idle=with_idle)
    checksum = page_checksum(KEY, [memoryview(CONTENT)])
    assert [response.checksum for response in caller.responses] == [checksum] * 2
    assert b"".join(caller.pages[0].buffers) == CONTENT


def test_buffers_are_free_again(serving: Start, with_idle: bool) -> None:
    """The owner can unmap the memory, since nothing refers to it any more."""
    caller = Caller(serving(answer(GOOD, GOOD[:-1])), stall_timeout=0.2)
    with pytest.raises(StallError):
        caller.receive(with_idle=with_idle)
    for buffer in caller.pages[0].buffers:
        buffer.release()


def test_buffer_that_cannot_be_written(serving: Start, with_idle: bool) -> None:
    caller = Caller(serving(answer(GOOD)))
    caller.pages = [Page(KEY, (memoryview(bytes(SIZE)),))]
    with pytest.raises(BufferError):
        caller.receive(with_idle=with_idle)


@pytest.mark.parametrize("more", [b"a", GOOD])
def test_more_than_a_small_page(serving: Start, with_idle: bool, more: bytes) -> None:
    """The whole body comes with the head; nothing is written beyond the page."""
    memory = memoryview(bytearray(SIZE))
    response = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + bytes(range(1, 11)) + more
    caller = Caller(serving(answer(response)))
    caller.pages = [Page(KEY, (memory[:4], memory[4:10]))]
    caller.receive(with_idle=with_idle)
    assert caller.responses == []
    assert not caller.connection.reusable
    assert not any(memory[10:])


@pytest.mark.parametrize("end", [False, True])
def test_signal_in_the_middle(serving: Start, with_idle: bool, end: bool) -> None:
    met = threading.Event()

    def handle(number: int, frame: object) -> None:
        met.set()
        if end:
            raise KeyboardInterrupt

    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GOOD[:1000])
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        met.wait()
        sock.sendall(GOOD[1000:])
        answer(GOOD)(sock)

    before, begin = signal.signal(signal.SIGUSR1, handle), time.monotonic()
    try:
        caller = Caller(serving(serve))
        with pytest.raises(KeyboardInterrupt) if end else nullcontext():
            caller.receive(with_idle=with_idle)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(caller.responses) == (0 if end else 2)
    assert time.monotonic() - begin < 10  # much less than the stall timeout of 20 s


def test_repeated_signals_do_not_hide_a_stall(serving: Start, with_idle: bool) -> None:
    end = threading.Event()

    def serve(sock: socket.socket) -> None:
        end.wait(30)

    caller = Caller(serving(serve), stall_timeout=0.5)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(StallError):
            caller.receive(with_idle=with_idle, seconds=30)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        end.set()


def test_transport_that_needs_the_gil(serving: Start, with_idle: bool) -> None:
    """No page is left out when a connection gets its second request."""
    caller = Caller(serving(answer(GOOD, GOOD)))
    caller.connection.transport = GilTransport(  # type: ignore[assignment]
        PlainTransport(caller.sock)
    )
    caller.receive(with_idle=with_idle)
    assert [response.number for response in caller.responses] == [0, 1]


class GilTransport:
    """Like a TLS transport, which the loop calls with the GIL."""

    def __init__(self, plain: PlainTransport) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> object:
        return getattr(self._plain, name)


class InterruptedTransport(GilTransport):
    """Interrupted in every call that receives."""

    def receive_now(self, buffers: Sequence[memoryview]) -> int:
        raise KeyboardInterrupt


def test_interrupt_within_tls(serving: Start, with_idle: bool) -> None:
    caller = Caller(serving(answer(GOOD)))
    caller.connection.transport = InterruptedTransport(  # type: ignore[assignment]
        PlainTransport(caller.sock)
    )
    with pytest.raises(KeyboardInterrupt):
        caller.receive(with_idle=with_idle)
    assert caller.responses == []


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
def test_other_responses_close_the_connection(
    serving: Start, with_idle: bool, response: bytes
) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(response)
        sock.shutdown(socket.SHUT_WR)

    caller = Caller(serving(serve))
    caller.receive(with_idle=with_idle)
    assert caller.responses == []
    assert len(caller.reasons) == 1, "the second page was not asked for"
    assert not caller.connection.reusable


def test_refusal_that_is_read_keeps_the_connection(serving: Start, with_idle: bool) -> None:
    caller = Caller(serving(answer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno")))
    caller.receive(with_idle=with_idle)
    assert caller.responses == []
    assert caller.reasons == ["status"], "the second page was not asked for"
    assert caller.connection.reusable


def test_second_answer_to_one_request_closes_the_connection(
    serving: Start, with_idle: bool
) -> None:
    """Otherwise, each request would get the response of the previous one."""

    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GOOD[:-1])
        sock.sendall(GOOD[-1:] + GOOD)  # both responses arrive together

    caller = Caller(serving(serve))
    caller.receive(with_idle=with_idle)
    assert len(caller.responses) == 1
    assert caller.reasons == ["malformed"]
    assert not caller.connection.reusable


def test_deadline_while_bytes_keep_coming(serving: Start, with_idle: bool) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        for at in range(len(GOOD)):
            sock.sendall(GOOD[at : at + 1])
            time.sleep(0.01)

    caller = Caller(serving(serve))
    with pytest.raises(OutOfTimeError):
        caller.receive(with_idle=with_idle, seconds=0.3)


@pytest.mark.parametrize("sent", [0, 10, len(GOOD) - 1])
def test_server_that_stalls(serving: Start, with_idle: bool, sent: int) -> None:
    end = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GOOD[:sent])
        end.wait(30)

    caller = Caller(serving(serve), stall_timeout=0.2)
    with pytest.raises(StallError):
        caller.receive(with_idle=with_idle)
    end.set()
    assert caller.connection.stalled
    assert not caller.connection.reusable
