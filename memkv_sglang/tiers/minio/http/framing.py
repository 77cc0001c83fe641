"""The heads of HTTP/1.1 responses (RFC 9112), as far as an object store's client needs them."""

from typing import NamedTuple

from memkv_sglang.tiers.minio.http.errors import ProtocolError

HEAD_LIMIT = 16 << 10
"""Bytes of a response's head at most."""

BODILESS = frozenset({204, 304})
"""Statuses whose responses never have a body."""


class ResponseHead(NamedTuple):
    """Status line and header fields of a response."""

    status: int
    length: int
    """Bytes of the body as declared (for HEAD: of the object)."""
    keep_alive: bool
    """Whether the server takes another request on the connection."""
    lower: bytes
    """The head in lower case: fields are looked for in it, since few of many are asked for."""
    original: bytes = b""
    """The head as the server wrote it."""

    def field(self, name: bytes) -> bytes | None:
        """Return the value of a header field (name and value in lower case)."""
        return _field(self.lower, name)

    @property
    def retry_after(self) -> float:
        """Seconds for which the server asks to be left alone; 0 if it does not, or by a date."""
        value = self.field(b"retry-after") or b""
        return float(value) if value.isdigit() and len(value) < 10 else 0.0


def parse_head(head: bytes) -> ResponseHead:
    """Parse a response's head up to the empty line that ends it. Raises `ProtocolError`."""
    version, _, rest = head[:13].partition(b" ")
    digits = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(digits) != 3 or not digits.isdigit():
        raise ProtocolError("not an HTTP/1.1 response")
    status = int(digits)
    if status < 200:
        raise ProtocolError(f"interim response {status} that nobody asked for")
    lower = head.lower()
    if _field(lower, b"transfer-encoding") is not None:
        raise ProtocolError("response with a transfer encoding")
    keep_alive = version == b"HTTP/1.1" and b"close" not in (_field(lower, b"connection") or b"")
    return ResponseHead(status, _length(status, lower), keep_alive, lower, head)


def framed_head(head: bytes, length: int) -> ResponseHead:
    """Return the head of a response that was seen to be a whole object of this length."""
    return ResponseHead(200, length, True, head.lower(), head)


def _length(status: int, lower: bytes) -> int:
    value = _field(lower, b"content-length")
    if value is None:
        if status in BODILESS:
            return 0
        raise ProtocolError("response without a content length")
    if not value.isdigit() or len(value) > 18:
        raise ProtocolError("malformed content length")
    return int(value)


def _field(lower: bytes, name: bytes) -> bytes | None:
    start = b"\r\n%b:" % name
    found = lower.find(start)
    if found < 0:
        return None
    found += len(start)
    if lower.find(start, found) >= 0:
        raise ProtocolError(f"repeated header field {name.decode()}")
    return lower[found:].partition(b"\r\n")[0].strip()
