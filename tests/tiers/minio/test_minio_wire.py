import pytest

from memkv_sglang.tiers.minio.http.errors import ProtocolError
from memkv_sglang.tiers.minio.http.framing import Framing, parse_head

OK = b"HTTP/1.1 200 OK\r\n"


def test_fields_are_found_in_any_case() -> None:
    head = parse_head(OK + b"Content-LENGTH:  12 \r\nX-Amz-Meta-Memkv-Format: 1\r\n")
    assert (head.status, head.length, head.keep_alive) == (200, 12, True)
    assert head.field(b"x-amz-meta-memkv-format") == b"1"
    assert head.field(b"x-amz-meta-memkv") is None


@pytest.mark.parametrize("status", [204, 304])
def test_some_statuses_need_no_length(status: int) -> None:
    assert parse_head(b"HTTP/1.1 %d X\r\n" % status).length == 0


def test_body_without_a_length_ends_with_the_connection() -> None:
    assert parse_head(OK).framing is Framing.UNTIL_CLOSE


@pytest.mark.parametrize(
    "head", [OK + b"Connection: Close\r\nContent-Length: 0\r\n", b"HTTP/1.0" + OK[8:]]
)
def test_connection_is_not_kept(head: bytes) -> None:
    if b"Content-Length" not in head:
        head += b"Content-Length: 0\r\n"
    assert not parse_head(head).keep_alive


@pytest.mark.parametrize(
    "head",
    [
        b"\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/2 200\r\n",
        b"HTTP/1.1 20\r\n",
        b"HTTP/1.1 abc\r\n",
        b"HTTP/1.1 100 Continue\r\n",
        OK + b"Content-Length : 10\r\n",
        OK + b"Transfer-Encoding: gzip\r\n",
        OK + b"Content-Length: -1\r\n",
        OK + b"Content-Length: 0x10\r\n",
        OK + b"Content-Length: " + b"9" * 30 + b"\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n",
        OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_malformed_heads_are_refused(head: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_head(head)
