"""One corpus of responses that a legal server or proxy may send, on the fast and the slow path."""

import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import NamedTuple

import msgspec
import pytest
from memkv_testbed.http_proxy import HttpFault, HttpFaultProxy
from memkv_testbed.minio_server import MinioServer
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.metrics.totals import bulk_fallbacks
from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http import (
    Connection,
    Response,
    TransferError,
)
from memkv_sglang.tiers.minio.http.transport import PlainTransport
from memkv_sglang.tiers.minio.objects.bulk_client import WHY_NOT
from tests.tiers.minio.conftest import OpenTier
from tests.tiers.minio.fast_path import SERVER, receive_on

SIZE = 6000
CONTENT = bytes(range(250)) * (SIZE // 250)
CHAIN = make_chain(make_namespace(page_bytes=SIZE), 20)
KEY = CHAIN.keys()[0]
REQUEST = b"GET / HTTP/1.1\r\n\r\n"


def chunked(body: bytes, size: int = 700, trailer: bytes = b"") -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return b"".join(chunks) + b"0\r\n" + trailer + b"\r\n"


class Case(NamedTuple):
    """A response to a GET, and what each path makes of it."""

    response: bytes
    fast: str = ""
    """Why the fast path falls back; empty if it delivers the page."""
    reusable: bool = True
    """Whether the slow path keeps the connection."""


def page(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK", body: bytes = CONTENT) -> bytes:
    return b"\r\n".join([line, *fields, b"", b""]) + body


LENGTH = b"Content-Length: %d" % SIZE
CHUNKED = b"Transfer-Encoding: chunked"

PAGES = {
    "usual": Case(page(LENGTH)),
    "no space after the colon": Case(page(LENGTH.replace(b" ", b""))),
    "spaces around the value": Case(page(LENGTH.replace(b" ", b" \t ") + b"  ")),
    "lower case": Case(page(LENGTH.lower())),
    "upper case": Case(page(LENGTH.upper())),
    "mixed case": Case(page(LENGTH.title().swapcase())),
    "leading zero": Case(page(LENGTH.replace(b": ", b": 0"))),
    "no reason phrase": Case(page(LENGTH, line=b"HTTP/1.1 200 ")),
    "no space after the status": Case(page(LENGTH, line=b"HTTP/1.1 200")),
    "keep-alive": Case(page(b"Connection: Keep-Alive", LENGTH)),
    "keep-alive without a space": Case(page(b"connection:keep-alive", LENGTH)),
    "connection repeated": Case(page(b"Connection: keep-alive", b"Connection: x", LENGTH)),
    "another field repeated": Case(page(b"Vary: a", b"Vary: b", LENGTH)),
    "close": Case(page(b"Connection: close", LENGTH), "close", False),
    "close without a space": Case(page(b"Connection:close", LENGTH), "close", False),
    "close in a list": Case(page(b"connection: x, Close", LENGTH), "close", False),
    "close repeated": Case(page(b"Connection: x", b"Connection: close", LENGTH), "close", False),
    "HTTP/1.0": Case(page(LENGTH, line=b"HTTP/1.0 200 OK"), "close", False),
    "chunked": Case(page(CHUNKED, body=chunked(CONTENT)), "framing"),
    "chunked in one": Case(page(CHUNKED.upper(), body=chunked(CONTENT, SIZE)), "framing"),
    "chunked in bytes": Case(page(CHUNKED, body=chunked(CONTENT, 1)), "framing"),
    "chunk extensions": Case(
        page(CHUNKED, body=chunked(CONTENT, SIZE).replace(b"1770\r", b"1770 ;a=b\r")), "framing"
    ),
    "trailer": Case(page(CHUNKED, body=chunked(CONTENT, trailer=b"x: y\r\nz: 1\r\n")), "framing"),
    "chunked and closed": Case(
        page(CHUNKED, b"Connection: close", body=chunked(CONTENT)), "framing", False
    ),
    "no length": Case(page(b"x: y"), "framing", False),
    "no length and HTTP/1.0": Case(page(line=b"HTTP/1.0 200 OK"), "framing", False),
    "interim 100": Case(b"HTTP/1.1 100 Continue\r\n\r\n" + page(LENGTH), "interim"),
    "interim 103": Case(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2 + page(LENGTH), "interim"
    ),
}

MISSING = b"HTTP/1.1 404 Not Found"
BODY = b"<Error><Code>NoSuchKey</Code></Error>"

MISSES = {
    "usual": page(b"Content-Length: %d" % len(BODY), line=MISSING, body=BODY),
    "no space": page(b"Content-Length:%d" % len(BODY), line=MISSING, body=BODY),
    "chunked": page(CHUNKED, line=MISSING, body=chunked(BODY)),
    "empty and chunked": page(CHUNKED, line=MISSING, body=chunked(b"")),
    "no length": page(line=MISSING, body=BODY),
    "close": page(b"Connection:close", b"Content-Length: %d" % len(BODY), line=MISSING, body=BODY),
    "interim": b"HTTP/1.1 103 x\r\n\r\n" + page(b"Content-Length: 0", line=MISSING, body=b""),
}

ILLEGAL = {
    "two lengths": page(LENGTH, LENGTH.replace(b"6000", b"6001")),
    "length and chunked": page(LENGTH, CHUNKED, body=chunked(CONTENT)),
    "space before the colon": page(LENGTH.replace(b":", b" :")),
    "another encoding": page(b"Transfer-Encoding: gzip, chunked", body=chunked(CONTENT)),
    "no chunk size": page(CHUNKED, body=b"\r\n" + CONTENT),
    "negative chunk": page(CHUNKED, body=b"-1\r\n" + CONTENT),
    "chunk too long": page(CHUNKED, body=b"5\r\n" + CONTENT),
    "chunked and short": page(CHUNKED, body=chunked(CONTENT[:-1])),
    "chunked and long": page(CHUNKED, body=chunked(CONTENT + b"x")),
    "chunked and cut": page(CHUNKED, body=chunked(CONTENT)[:-9]),
    "endless trailer": page(CHUNKED, body=chunked(CONTENT, trailer=b"x: y\r\n" * 1000)),
    "switching protocols": b"HTTP/1.1 101 x\r\n\r\n" + page(LENGTH),
}


class Served:
    """A connection whose other end sends bytes for the first request and then closes."""

    def __init__(self, response: bytes, piece: int) -> None:
        ours, self._theirs = socket.socketpair()
        self.connection = Connection(SERVER, PlainTransport(ours), 5.0)
        self._thread = threading.Thread(target=self._serve, args=(response, piece))
        self._thread.start()

    def _serve(self, response: bytes, piece: int) -> None:
        with suppress(OSError):
            self._theirs.recv(1000)
            for i in range(0, len(response), piece):
                self._theirs.sendall(response[i : i + piece])
            self._theirs.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Connection:
        return self.connection

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._thread.join()
        self._theirs.close()


PIECES = pytest.mark.parametrize("piece", [1 << 20, 997])


def new_page() -> Page:
    memory = memoryview(bytearray(SIZE))
    return Page(KEY, (memory[:100], memory[100:]))


def slow(connection: Connection, target: Page) -> int:
    """Receive a page as the slow path does; return the status."""
    deadline = time.monotonic() + 5
    connection.send(REQUEST, (), deadline)
    head = connection.receive_head(deadline)
    if head.status == 200:
        connection.receive_body(target.buffers, deadline)
    else:
        connection.discard_body(deadline)
    return head.status


def fast(connection: Connection, target: Page) -> tuple[list[Response], list[str]]:
    """Receive a page on the fast path; return the responses and the reasons to fall back."""
    reasons: list[str] = []
    batch = receive_on(connection, target, reasons.append)
    return batch.unverified(), reasons


@PIECES
@pytest.mark.parametrize("case", PAGES.values(), ids=PAGES)
def test_the_slow_path_receives_every_legal_response(case: Case, piece: int) -> None:
    target = new_page()
    with Served(case.response, piece) as connection:
        assert slow(connection, target) == 200
        assert connection.reusable == case.reusable
    assert b"".join(target.buffers) == CONTENT


@PIECES
@pytest.mark.parametrize("case", PAGES.values(), ids=PAGES)
def test_the_fast_path_receives_it_or_falls_back(case: Case, piece: int) -> None:
    target = new_page()
    with Served(case.response, piece) as connection:
        delivered, reasons = fast(connection, target)
        assert reasons == ([case.fast] if case.fast else [])
        assert len(delivered) == (not case.fast)
        assert connection.reusable == (not case.fast)
    if delivered:
        assert b"".join(target.buffers) == CONTENT
        assert delivered[0].checksum == page_checksum(KEY, [memoryview(CONTENT)])


@PIECES
@pytest.mark.parametrize("response", MISSES.values(), ids=MISSES)
def test_a_miss_is_a_miss_on_both_paths(response: bytes, piece: int) -> None:
    with Served(response, piece) as connection:
        assert slow(connection, new_page()) == 404
        closes = b"lose" in response or (b"\r\n\r\n<" in response and b"Length" not in response)
        assert connection.reusable == (not closes)
    with Served(response, piece) as connection:
        delivered, reasons = fast(connection, new_page())
        assert delivered == []
        assert reasons in (["status"], ["interim"])


@PIECES
@pytest.mark.parametrize("response", ILLEGAL.values(), ids=ILLEGAL)
def test_neither_path_accepts_an_illegal_response(response: bytes, piece: int) -> None:
    with Served(response, piece) as connection, pytest.raises(TransferError):
        slow(connection, new_page())
    with Served(response, piece) as connection:
        delivered, reasons = fast(connection, new_page())
        assert delivered == []
        assert len(reasons) == 1
        assert not connection.reusable


@pytest.mark.parametrize("limit", [len(CONTENT), len(CONTENT) - 1])
@pytest.mark.parametrize("name", ["usual", "chunked", "no length", "chunk extensions"])
def test_a_body_beyond_the_limit_is_not_read(name: str, limit: int) -> None:
    with Served(PAGES[name].response, 997) as connection:
        deadline = time.monotonic() + 5
        connection.send(REQUEST, (), deadline)
        connection.receive_head(deadline)
        body = connection.read_body(limit, deadline)
        assert body == (CONTENT if limit == len(CONTENT) else None)
        assert connection.reusable == (body is not None and name != "no length")


def edited(old: bytes, new: bytes) -> HttpFault:
    return HttpFault(methods=("GET",), edit_response=lambda head: head.replace(old, new))


FALLBACKS = {
    "no space": (edited(b"Content-Length: ", b"Content-Length:"), None),
    "close": (edited(b"\r\n\r\n", b"\r\nConnection:close\r\n\r\n"), "close"),
    "interim": (edited(b"HTTP/1.1 200", b"HTTP/1.1 103 x\r\n\r\nHTTP/1.1 200"), "interim"),
}


@pytest.mark.skipif(WHY_NOT != "", reason="not compiled: needs a C compiler with headers")
@pytest.mark.parametrize(("fault", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_loads_succeed_and_fallbacks_are_counted(
    minio_config: MinioConfig,
    minio_server: MinioServer,
    open_tier: OpenTier,
    fault: HttpFault,
    reason: str | None,
) -> None:
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        tier = open_tier(msgspec.structs.replace(minio_config, endpoint=proxy.url))
        registry = CollectorRegistry()
        registry.register(bulk_fallbacks(tier.telemetry.fallbacks))

        def count(reason: str) -> float:
            name = "memkv_minio_bulk_fallbacks_total"
            return registry.get_sample_value(name, {"reason": reason}) or 0.0

        keys = CHAIN.keys()
        pages = [make_page(key, [SIZE], filled=True) for key in keys]
        assert set(tier.spill(pages, time.monotonic() + 30)) == {SpillResult.STORED}
        assert (
            registry.get_sample_value("memkv_minio_bulk_fallbacks_total", {"reason": "framing"})
            == 0.0
        )
        proxy.fault = fault
        for _ in range(2):
            target = [make_page(key, [SIZE], filled=False) for key in keys]
            assert set(tier.load(target, time.monotonic() + 30)) == {LoadResult.LOADED}
            assert all(map(holds_content, target))
        if reason is None:
            assert not any(tier.telemetry.fallbacks().values())
        else:
            assert count(reason) >= 1


FIELDS = {
    "usual": b"",
    "close": b"Connection: close\r\n",
    "close without a space": b"Connection:close\r\n",
}


class ClosingServer:
    """Answers HEAD requests for stored pages, and closes each connection after some of them."""

    def __init__(self, answered: int, fields: bytes) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._answered, self._fields = answered, fields
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                peer = self._listening.accept()[0]
                threading.Thread(target=self._answer, args=(peer,), daemon=True).start()

    def _answer(self, peer: socket.socket) -> None:
        with peer, suppress(OSError), peer.makefile("rb") as stream:
            for number in range(1, self._answered + 1):
                if not (line := stream.readline()):
                    return
                while stream.readline().strip():
                    pass
                peer.sendall(self._response(line, last=number == self._answered))
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(1 << 16):
                pass

    def _response(self, line: bytes, *, last: bool) -> bytes:
        method, path, _ = line.split(b" ")
        fields = self._fields if last else b""
        if method == b"GET" and path.endswith(b"/memkv.json"):
            record = b'{"format":2}'
            return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (
                fields,
                len(record),
                record,
            )
        if method != b"HEAD" or path.count(b"/") == 1 or path.endswith(b"/"):
            return b"HTTP/1.1 200 OK\r\n" + fields + b"Content-Length: 0\r\n\r\n"
        stored = b"x-amz-meta-memkv-format: 1\r\nx-amz-meta-memkv-length: %d\r\n" % SIZE
        stored += b"x-amz-meta-memkv-checksum: " + b"0" * 32 + b"\r\nETag: x\r\n"
        return b"HTTP/1.1 200 OK\r\n" + fields + stored + b"Content-Length: %d\r\n\r\n" % SIZE

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("answered", [1, 3, 1000])
def test_requests_pipelined_behind_a_close_are_sent_again(fields: bytes, answered: int) -> None:
    with ExitStack() as held:
        server = ClosingServer(answered, fields)
        held.callback(server.close)
        config = MinioConfig(
            endpoint=f"http://127.0.0.1:{server.port}", access_key="a", secret_key="b" * 8
        )
        tier = MinioTier(config)
        held.callback(tier.close)
        tier.check(time.monotonic() + 30)
        for _ in range(2):
            assert tier.present(CHAIN.keys(), time.monotonic() + 30) == [True] * 20
            tier.invalidate(CHAIN.keys())
        assert tier.lookup(CHAIN, time.monotonic() + 30).length == 20
        assert tier.problem() == ""
