"""One kept-alive HTTP/1.1 connection: requests go out, heads are parsed, bodies land in pages."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from memkv_sglang.tiers.minio.http.endpoints import Endpoint
from memkv_sglang.tiers.minio.http.errors import (
    OutOfTimeError,
    ProtocolError,
    StaleError,
    StallError,
    TransferError,
)
from memkv_sglang.tiers.minio.http.framing import BODILESS, HEAD_LIMIT, ResponseHead, parse_head
from memkv_sglang.tiers.minio.http.transport import Transport

DISCARD_LIMIT = 64 << 10
"""Bytes of an unwanted body that are read to keep a connection; beyond it is closed."""

PAUSE = 1.0
"""Seconds without use after which a balancer may have forgotten a connection."""

_Buffers = TypeVar("_Buffers", memoryview, Sequence[memoryview])


class Connection:
    """A connection of one thread at a time. After any error it can only be closed.

    Every call blocks at most until `deadline`, and at most `stall_timeout` without a byte moving.
    """

    def __init__(self, endpoint: Endpoint, transport: Transport, stall_timeout: float) -> None:
        """Take over a transport that is connected to the endpoint."""
        self.endpoint = endpoint
        self.reused = False
        self.idle_since = 0.0
        """When the last exchange ended, on `time.monotonic`."""
        self.stalled = False
        self.stale = False
        """Whether it was dead when it was used again."""
        self.transport = transport
        self._stall_timeout = stall_timeout
        self._window = bytearray(HEAD_LIMIT)
        self._view = memoryview(self._window)
        self._start = self._end = 0
        self._unanswered = 0
        self._unread = 0
        self._untouched = True
        self._first_wait = stall_timeout
        self._keep_alive = True
        self._sent_body = False

    @property
    def reusable(self) -> bool:
        """Whether every response was read to its last byte and the server takes more requests."""
        settled = self._unanswered == self._unread == 0 and self._start == self._end
        return settled and self._keep_alive

    def send(
        self, heads: bytes, body: Sequence[memoryview], deadline: float, *, requests: int = 1
    ) -> None:
        """Send requests: their heads, and the body of the last."""
        self._unanswered += requests
        self._untouched = True
        self._first_wait = self.patience(deadline)
        self._sent_body = bool(body)
        buffers = [memoryview(heads), *(buffer for buffer in body if buffer.nbytes)]
        while buffers:
            buffers = advance(buffers, self._move(self.transport.send, buffers, deadline))

    def receive_head(self, deadline: float, *, bodiless: bool = False) -> ResponseHead:
        """Read the head of the next response; `bodiless` if the request was a HEAD."""
        while (end := self._find_head_end()) < 0:
            self._read_ahead(deadline)
        head = parse_head(bytes(self._view[self._start : end + 2]))
        self._start = end + 4
        self._unanswered -= 1
        self._unread = 0 if bodiless or head.status in BODILESS else head.length
        # An error may answer a body before all of it was read: what is left of it, and what comes
        # back for that, would be taken for the next request and its response.
        self._keep_alive = head.keep_alive and not (self._sent_body and head.status >= 300)
        return head

    def receive_body(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fill the buffers with the body; they must be as long as it, and no byte more is read."""
        assert sum(buffer.nbytes for buffer in buffers) == self._unread
        missing = [buffer for buffer in buffers if buffer.nbytes]
        self.fill(self._take_read_ahead(missing), deadline)
        self._unread = 0

    def fill(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fill the buffers, none of them empty, with what comes next."""
        while buffers:
            buffers = advance(buffers, self._move(self.transport.receive, buffers, deadline))

    def discard_body(self, deadline: float) -> bytes:
        """Read and return an unwanted body, so that the connection can be used again.

        One beyond `DISCARD_LIMIT` is left unread; the connection is then not reusable.
        """
        if self._unread > DISCARD_LIMIT:
            return b""
        body = bytearray(self._unread)
        self.receive_body([memoryview(body)], deadline)
        return bytes(body)

    def patience(self, deadline: float) -> float:
        """Return how many seconds to wait for the first byte of a response to a request sent now.

        After a pause the connection may be dead, so half of the time is kept for a fresh one.
        """
        now = time.monotonic()
        if self.reused and now - self.idle_since >= PAUSE:
            return min(self._stall_timeout, (deadline - now) / 2)
        return self._stall_timeout

    def is_idle(self) -> bool:
        """Tell whether nothing came since the last response: else it is out of step, or closed."""
        return self.transport.is_idle()

    def interrupt(self) -> None:
        """Make the call that another thread has under way fail."""
        self.transport.interrupt()

    def close(self) -> None:
        """Close; idempotent."""
        self._keep_alive = False
        self.transport.close()

    def _find_head_end(self) -> int:
        return self._window.find(b"\r\n\r\n", self._start, self._end)

    def _read_ahead(self, deadline: float) -> None:
        if self._start:
            held = bytes(self._view[self._start : self._end])
            self._view[: len(held)] = held
            self._start, self._end = 0, len(held)
        if self._end == HEAD_LIMIT:
            raise ProtocolError(f"response head of more than {HEAD_LIMIT} bytes")
        self._end += self._move(self.transport.receive_some, self._view[self._end :], deadline)
        self._untouched = False

    def _take_read_ahead(self, buffers: list[memoryview]) -> list[memoryview]:
        """Move the part of the body that came with the head."""
        while buffers and self._start < self._end:
            count = min(buffers[0].nbytes, self._end - self._start)
            buffers[0][:count] = self._view[self._start : self._start + count]
            self._start += count
            buffers = advance(buffers, count)
        return buffers

    def _move(
        self, operation: Callable[[_Buffers], int], buffers: _Buffers, deadline: float
    ) -> int:
        left = deadline - time.monotonic()
        if left <= 0:
            raise OutOfTimeError("the deadline came first")
        try:
            limit = self._first_wait if self._untouched else self._stall_timeout
            self.transport.set_timeout(min(left, limit))
            count = operation(buffers)
        except TimeoutError as error:
            raise self._late(deadline) from error
        except OSError as error:
            raise self._closed(str(error)) from error
        if count == 0:
            raise self._closed("the server closed the connection")
        return count

    @property
    def _may_be_stale(self) -> bool:
        return self.reused and self._untouched

    def _late(self, deadline: float) -> TransferError:
        if self._may_be_stale and time.monotonic() < deadline:
            return self._closed("the connection stayed silent")
        if time.monotonic() >= deadline:
            return OutOfTimeError("the deadline came first")
        self.stalled = True
        return StallError(self._stall_timeout)

    def _closed(self, reason: str) -> TransferError:
        self.stale = self._may_be_stale
        return StaleError(reason) if self.stale else TransferError(reason)


def advance(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what is left of the buffers behind their first `count` bytes."""
    rest = list(buffers)
    while rest and count >= rest[0].nbytes:
        count -= rest.pop(0).nbytes
    if count:
        rest[0] = rest[0][count:]
    return rest
