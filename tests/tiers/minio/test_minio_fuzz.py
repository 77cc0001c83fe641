"""Fuzzed responses: every parser accepts or rejects them, and none crashes."""

import socket
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.http.errors import ProtocolError, TransferError, UnreadableError
from memkv_sglang.tiers.minio.http.explain import refusal, refused, unusable_answer
from memkv_sglang.tiers.minio.http.framing import HEAD_LIMIT, ResponseHead, parse_head
from memkv_sglang.tiers.minio.http.times import ServerClock, is_plausible, modified_time, parse_date
from memkv_sglang.tiers.minio.http.transport import PlainTransport
from memkv_sglang.tiers.minio.names import (
    checksum_matches,
    is_foreign,
    is_stored,
    metadata_mismatch,
    stores_page,
)
from memkv_sglang.tiers.minio.objects.client import demand_printable
from memkv_sglang.tiers.minio.retention.renewal import kept_fields
from tests.tiers.minio.fast_path import SERVER, receive, receive_on

SIZE = 600
CONTENT = bytes(range(200)) * (SIZE // 200)
KEY = make_chain(make_namespace(page_bytes=SIZE), 1).keys()[0]
CHECKSUM = page_checksum(KEY, [memoryview(CONTENT)])
LINE = 600
MANY = 250

STATUS_LINES = [
    *(b"HTTP/1.1 200 OK", b"HTTP/1.1 200 ", b"HTTP/1.1 200", b"HTTP/1.0 200 OK"),
    *(b"HTTP/1.1 404 Not Found", b"HTTP/1.1 403 X", b"HTTP/1.1 206 X", b"HTTP/1.1 304 X"),
    *(b"HTTP/1.1 204 X", b"HTTP/1.1 100 Continue", b"HTTP/1.1 503 X", b"HTTP/1.1 999 X"),
    *(b"HTTP/1.1  200 OK", b"http/1.1 200 OK", b"HTTP/2 200", b"", b"HTTP/1.1 2000 OK"),
]

DATE = b"Sun, 29 Nov 2026 22:50:23 GMT"
NUMBERS = [b"%d" % SIZE, b"0", b"1", b"%d" % (SIZE + 1), b"-1", b"+600", b" 600 ", b"0600", b"6e2"]
NUMBERS += [b"9" * 17, b"9" * 18, b"9" * 19, b"9" * 400, b"0x258", b"600,600", b"\xb2", b""]
VALUES = {
    b"Content-Length": NUMBERS,
    b"content-length": NUMBERS,
    b"Transfer-Encoding": [b"chunked", b"identity", b""],
    b"Connection": [b"close", b"Close", b"keep-alive", b"close, x", b" close"],
    b"ETag": [b'"0123"', b"", b'"' + b"a" * 300],
    b"Content-Type": [b"text/html", b"application/xml", b"\xff"],
    b"Date": [DATE, DATE.lower(), b"0", DATE[:-3], DATE.replace(b"Nov", b"Foo"), b"\xff" * 29],
    b"Last-Modified": [DATE, DATE.replace(b"2026", b"0000"), DATE.replace(b"29 N", b"31 N"), b""],
    b"Retry-After": [b"1", b"-1", b"1e9", b"9" * 30, DATE, b"\xb2"],
    b"x-amz-meta-memkv-format": [b"1", b"2", b"", b"01"],
    b"x-amz-meta-memkv-length": NUMBERS,
    b"x-amz-meta-memkv-checksum": [CHECKSUM.hex().encode(), b"0" * 32, b"g" * 32, b"0" * 31, b""],
    b"x-amz-meta-memkv-key": [b"k", b"", b"\xff"],
    b"x-amz-bucket-region": [b"eu-west-1", b"../..", b"\xff", b"a" * 500],
    b"x-minio-error-code": [b"AccessDenied", b"authorizationheadermalformed", b"<x>", b"a" * 500],
    b"x-minio-error-desc": [b"expecting 'eu-west-1'", b"expecting '\x1b[31m'"],
}

FIELDS = st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.one_of(st.sampled_from(VALUES[name]), st.binary(max_size=40))
    )
)
SEPARATORS = st.sampled_from([b": ", b":", b" : ", b":\t", b""])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Draw a head up to the empty line; most are nearly valid."""
    sound = [
        (b"Content-Length", b"%d" % SIZE),
        (b"ETag", b'"0123"'),
        (b"Date", DATE),
        (b"Last-Modified", DATE),
        (b"x-amz-meta-memkv-format", b"1"),
        (b"x-amz-meta-memkv-length", b"%d" % SIZE),
        (b"x-amz-meta-memkv-checksum", CHECKSUM.hex().encode()),
    ]
    fields = [field for field in sound if draw(st.integers(0, 9))]
    fields = draw(st.permutations(fields + draw(st.lists(FIELDS, max_size=3))))
    line = STATUS_LINES[0] if draw(st.booleans()) else draw(st.sampled_from(STATUS_LINES))
    head = line + b"\r\n"
    for name, value in fields:
        separator = b": " if draw(st.integers(0, 9)) else draw(SEPARATORS)
        head += name + separator + value + b"\r\n"
    if not draw(st.integers(0, 4)):
        where = draw(st.integers(0, len(head) - 1))
        head = head[:where] + draw(st.binary(max_size=3)) + head[where + draw(st.integers(0, 2)) :]
    return head.split(b"\r\n\r\n")[0].removesuffix(b"\r\n") + b"\r\n"


BODIES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            b"<Error><Code>AccessDenied</Code></Error>",
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-1</Region></Error>",
            b"<Code></Code>",
            b"<Code>" + b"A" * 5000 + b"</Code>",
            b"<Code>\x1b[31m</Code><Region>\n</Region>",
            b"<Error>" * 50_000,
            b"expecting '" + b"a" * 100_000,
        ]
    ),
)


def parsed(head: bytes) -> ResponseHead | None:
    try:
        return parse_head(head)
    except ProtocolError:
        return None


@settings(max_examples=120)
@given(heads())
def test_a_head_is_parsed_or_refused(head: bytes) -> None:
    found = parsed(head)
    if found is not None:
        assert 200 <= found.status <= 999
        assert 0 <= found.length < 10**18
        with suppress(ProtocolError):  # for a repeated field
            assert 0 <= found.retry_after < 10**9


@settings(max_examples=120)
@given(heads())
def test_any_metadata_is_judged_without_an_exception(head: bytes) -> None:
    found = parsed(head)
    if found is None:
        return
    there = stores_page(found)
    if there:
        assert (found.status, parse_head(head).field(b"x-amz-meta-memkv-format")) == (200, b"1")
    for judge in (is_foreign, lambda head: is_stored(head, b"")):
        with suppress(ProtocolError):
            judge(found)
    fields = kept_fields(found)
    with suppress(ProtocolError):
        demand_printable(fields)
        assert not any(set("\r\n\0") & set(name + value) for name, value in fields.items())
    assert str(unusable_answer(found)).isprintable()


@settings(max_examples=120)
@given(heads())
def test_the_fast_match_accepts_no_more_than_the_full_check(head: bytes) -> None:
    page = Page(KEY, (memoryview(bytearray(SIZE)),))
    if receive(head + b"\r\n" + CONTENT, page).checksums() == [None]:
        return
    long = parsed(head)
    if long is not None and long.status == 200 and long.length == SIZE:
        try:
            assert metadata_mismatch(long, page) is None
            assert checksum_matches(long, CHECKSUM)
        except UnreadableError:
            pytest.fail("the short look accepted a page of another length")


@settings(max_examples=120)
@given(heads(), BODIES, st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "X"]))
def test_a_refusal_is_one_short_line(head: bytes, body: bytes, method: str) -> None:
    found = parsed(head)
    if found is None:
        return
    with suppress(ProtocolError):  # a repeated Retry-After
        text = str(refused(found, body, method))
        assert text.isprintable()
        assert len(text) < LINE


@settings(max_examples=100)
@given(
    st.integers(200, 999),
    st.dictionaries(
        st.sampled_from(["date", "content-type", "x-amz-bucket-region", "x-minio-error-code"]),
        st.text(max_size=100),
    ),
    BODIES,
)
def test_a_refusal_of_the_control_path_is_one_short_line(
    status: int, fields: dict[str, str], body: bytes
) -> None:
    text = str(refusal(status, fields.get, body, "s3:ListBucket"))
    assert text.isprintable()
    assert len(text) < LINE


@settings(max_examples=120)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.sampled_from(VALUES[b"Date"] + VALUES[b"Last-Modified"]),
        st.tuples(st.integers(0, 28), st.binary(min_size=1, max_size=1)).map(
            lambda edit: DATE[: edit[0]] + edit[1] + DATE[edit[0] + 1 :]
        ),
    )
)
def test_a_date_is_parsed_or_rejected(value: bytes) -> None:
    try:
        seconds = parse_date(value)
    except ProtocolError:
        return
    assert -62135596800 <= seconds < 253402300800  # years 1 to 9999


@settings(max_examples=120)
@given(heads())
def test_no_response_moves_the_clock_far(head: bytes) -> None:
    found = parsed(head)
    if found is None:
        return
    clock = ServerClock()
    now = time.time()
    with suppress(ProtocolError):
        assert abs(clock.now(found) - now) <= 901
    with suppress(ProtocolError):
        assert is_plausible(modified_time(found))


class Stream:
    """A connection whose other end sends one response and then closes."""

    def __init__(self, response: bytes) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(SERVER, PlainTransport(ours), 5.0)
        self._theirs = theirs
        self._thread = threading.Thread(target=self._serve, args=(response,))
        self._thread.start()

    def _serve(self, response: bytes) -> None:
        with suppress(OSError):
            self._theirs.recv(1000)
            self._theirs.sendall(response)
            self._theirs.shutdown(socket.SHUT_WR)

    def ask(self) -> ResponseHead | None:
        """Return the head as the slow path parses it, None if it is rejected."""
        deadline = time.monotonic() + 5
        try:
            self.connection.send(b"GET / HTTP/1.1\r\n\r\n", (), deadline)
            return self.connection.receive_head(deadline)
        except TransferError:
            return None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self._thread.join()
        self._theirs.close()


@settings(max_examples=MANY)
@given(heads(), st.sampled_from([CONTENT, CONTENT[:-1], CONTENT + b"x", b"", CONTENT * 2]))
def test_both_receive_paths_agree(head: bytes, body: bytes) -> None:
    """The slow path accepts every response that the fast path delivers."""
    response = head + b"\r\n" + body
    page = Page(KEY, (memoryview(bytearray(SIZE)),))
    with Stream(response) as stream:
        batch = receive_on(stream.connection, page)
    checksums = [one.checksum for one in batch.unverified()] or batch.checksums()
    with Stream(response) as stream:
        found = stream.ask()
    if checksums != [None]:
        assert found is not None
        assert (found.status, found.length, found.keep_alive) == (200, SIZE, True)
        assert checksums[0] == page_checksum(KEY, [memoryview(body[:SIZE])])


@given(st.integers(0, 40), st.sampled_from([b"x: y\r\n", b"\x00" * 100, b"\r\n" * 3, b"a" * 1000]))
@settings(max_examples=60)
def test_a_head_without_an_end_takes_bounded_memory(count: int, piece: bytes) -> None:
    with Stream(b"HTTP/1.1 200 OK\r\n" + piece * (count * 40)) as stream:
        stream.ask()
        assert len(stream.connection._window) == HEAD_LIMIT
