"""The framing of HTTP/1.1 responses (RFC 9112), for the fast path and the slow path alike."""

import re
from enum import Enum, auto
from typing import NamedTuple

from memkv_sglang.tiers.minio.http.errors import ProtocolError

HEAD_LIMIT = 16 << 10
"""Maximum size of a response head, in bytes."""

BODILESS = frozenset({204, 304})
"""Statuses whose responses never have a body."""

_INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)\d\d[ \r]")

_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;.*)?", re.DOTALL)


class Framing(Enum):
    """What marks the end of a body."""

    LENGTH = auto()
    """The declared length."""
    CHUNKED = auto()
    """A chunk of size 0."""
    UNTIL_CLOSE = auto()
    """The end of the connection."""


class ResponseHead(NamedTuple):
    """The status line and the header fields of a response."""

    status: int
    length: int
    """Declared length of the body in bytes; for a HEAD, that of the object; 0 if none is declared.
    """
    keep_alive: bool
    """Whether the connection accepts another request after the body."""
    lower: bytes
    """The head in lower case. Fields are searched in it, because callers need only few of many."""
    original: bytes = b""
    """The head as received."""
    framing: Framing = Framing.LENGTH
    """How the end of the body is marked, if there is a body."""

    def field(self, name: bytes) -> bytes | None:
        """Return the value of a header field. Name and value are in lower case.

        Raises `ProtocolError` if the field is repeated.
        """
        return _field(self.lower, name)

    @property
    def retry_after(self) -> float:
        """Seconds for which the server asks clients to back off; 0 for none or a date."""
        value = self.field(b"retry-after") or b""
        return float(value) if value.isdigit() and len(value) < 10 else 0.0


def is_interim(head: bytes) -> bool:
    """Return whether a head is an interim response (1xx), which precedes the final response."""
    return _INTERIM.match(head) is not None


def parse_head(head: bytes) -> ResponseHead:
    """Parse the head of a final response, up to the empty line. Raises `ProtocolError`."""
    version, _, rest = head[:13].partition(b" ")
    digits = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(digits) != 3 or not digits.isdigit():
        raise ProtocolError("not an HTTP/1.1 response")
    status = int(digits)
    if status < 200:
        raise ProtocolError(f"unexpected interim response {status}")
    lower = head.lower()
    framing, length = _framing(version, status, lower)
    connection = _tokens(lower, b"connection") or ()
    keep_alive = version == b"HTTP/1.1" and b"close" not in connection
    return ResponseHead(status, length, keep_alive, lower, head, framing)


def parse_chunk_size(line: bytes) -> int:
    """Return the size in a chunk's first line, in bytes. Raises `ProtocolError`."""
    match = _CHUNK_SIZE.fullmatch(line)
    if match is None:
        raise ProtocolError("malformed chunk size")
    return int(match[1], 16)


def _framing(version: bytes, status: int, lower: bytes) -> tuple[Framing, int]:
    encoding = _tokens(lower, b"transfer-encoding")
    value = _field(lower, b"content-length")
    if encoding is not None:
        if value is not None:
            raise ProtocolError("response with a transfer encoding and a content length")
        if encoding != [b"chunked"] or version != b"HTTP/1.1":
            raise ProtocolError("response with an unknown transfer encoding")
        return Framing.CHUNKED, 0
    if value is None:
        if b"\r\ncontent-length" in lower or b"\r\ntransfer-encoding" in lower:
            raise ProtocolError("malformed header field")
        return (Framing.LENGTH if status in BODILESS else Framing.UNTIL_CLOSE), 0
    if not value.isdigit() or len(value) > 18:
        raise ProtocolError("malformed content length")
    return Framing.LENGTH, int(value)


def _tokens(lower: bytes, name: bytes) -> list[bytes] | None:
    """Return the members of a list field, which may be repeated; None if the field is missing."""
    start = b"\r\n%b:" % name
    if start not in lower:
        return None
    values = [part.partition(b"\r\n")[0] for part in lower.split(start)[1:]]
    tokens = [token.strip() for value in values for token in value.split(b",")]
    return [token for token in tokens if token]


def _field(lower: bytes, name: bytes) -> bytes | None:
    start = b"\r\n%b:" % name
    found = lower.find(start)
    if found < 0:
        return None
    found += len(start)
    if lower.find(start, found) >= 0:
        raise ProtocolError(f"repeated header field {name.decode()}")
    return lower[found:].partition(b"\r\n")[0].strip()
