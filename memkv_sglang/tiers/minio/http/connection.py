"""A persistent HTTP/1.1 connection: sends requests, parses heads, receives bodies into pages."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from memkv_sglang.tiers.minio.http.endpoints import Endpoint
from memkv_sglang.tiers.minio.http.errors import (
    ClosedError,
    OutOfTimeError,
    ProtocolError,
    StaleError,
    StallError,
    TransferError,
)
from memkv_sglang.tiers.minio.http.framing import (
    BODILESS,
    HEAD_LIMIT,
    Framing,
    ResponseHead,
    is_interim,
    parse_chunk_size,
    parse_head,
)
from memkv_sglang.tiers.minio.http.transport import Transport

DISCARD_LIMIT = 64 << 10
"""Maximum bytes of an unwanted body that are read so that the connection can be reused."""

TRAILER_LIMIT = 100
"""Maximum number of trailer fields after a chunked body."""

PAUSE = 1.0
"""Seconds of idleness after which a load balancer may have dropped a connection."""

_Buffers = TypeVar("_Buffers", memoryview, Sequence[memoryview])


class Connection:
    """A connection that one thread uses at a time. After an error, it can only be closed.

    Calls block until `deadline` at most, and for at most `stall_timeout` seconds without progress.
    """

    def __init__(self, endpoint: Endpoint, transport: Transport, stall_timeout: float) -> None:
        """Take ownership of a transport that is connected to the endpoint."""
        self.endpoint = endpoint
        self.reused = False
        self.idle_since = 0.0
        """When the last exchange ended, on `time.monotonic`."""
        self.stalled = False
        self.stale = False
        """Whether the connection was found dead when it was reused."""
        self.transport = transport
        self._stall_timeout = stall_timeout
        self._window = bytearray(HEAD_LIMIT)
        self._view = memoryview(self._window)
        self._start = self._end = 0
        self._unanswered = 0
        self._unread: int | None = 0
        """Bytes of the body that were not read yet; None if the head declares no length."""
        self._chunked = False
        self._silent = True
        """Whether no byte has arrived since the last request."""
        self._first_wait = stall_timeout
        self._keep_alive = True
        self._sent_body = False

    @property
    def reusable(self) -> bool:
        """Whether all responses were read completely and the server accepts more requests."""
        settled = self._unanswered == self._unread == 0 and self._start == self._end
        return settled and self._keep_alive

    def send(
        self, heads: bytes, body: Sequence[memoryview], deadline: float, *, requests: int = 1
    ) -> None:
        """Send the heads of several requests, and the body of the last one."""
        self._unanswered += requests
        self._silent = True
        self._first_wait = self.patience(deadline)
        self._sent_body = bool(body)
        buffers = [memoryview(heads), *(buffer for buffer in body if buffer.nbytes)]
        while buffers:
            buffers = advance(buffers, self._move(self.transport.send, buffers, deadline))

    def receive_head(self, deadline: float, *, bodiless: bool = False) -> ResponseHead:
        """Receive the head of the next final response; `bodiless` if the request was a HEAD."""
        while is_interim(raw := self._receive_raw_head(deadline)):
            pass
        head = parse_head(raw)
        self._unanswered -= 1
        sized = head.framing is Framing.LENGTH
        no_body = bodiless or head.status in BODILESS
        self._unread = 0 if no_body else head.length if sized else None
        self._chunked = head.framing is Framing.CHUNKED
        # A server may refuse a request before it has read the whole body, and would then take the
        # rest of the body for the next request.
        self._keep_alive = (
            head.keep_alive
            and not (self._sent_body and head.status >= 300)
            and (no_body or head.framing is not Framing.UNTIL_CLOSE)
        )
        return head

    def receive_body(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fill the buffers with the body, which must be exactly as long as they are.

        Reads no byte beyond them. Raises `ProtocolError` if a chunked body has another length.
        """
        missing = [buffer for buffer in buffers if buffer.nbytes]
        if self._chunked and self._unread is None:
            self._receive_chunks(missing, deadline)
        else:
            assert self._unread in (None, sum(buffer.nbytes for buffer in buffers))
            self.fill(self._take_read_ahead(missing), deadline)
        self._unread = 0

    def fill(self, buffers: Sequence[memoryview], deadline: float) -> None:
        """Fill the buffers, none of them empty, with the next bytes."""
        while buffers:
            buffers = advance(buffers, self._move(self.transport.receive, buffers, deadline))

    def read_body(self, limit: int, deadline: float) -> bytes | None:
        """Read and return the body; None if it is longer than `limit` bytes.

        A longer body is not read, so the connection cannot be reused.
        """
        if self._unread is None:
            return self._read_unsized(limit, deadline)
        if self._unread > limit:
            return None
        body = bytearray(self._unread)
        self.receive_body([memoryview(body)], deadline)
        return bytes(body)

    def discard_body(self, deadline: float) -> bytes:
        """Read and return an unwanted body, so that the connection can be reused.

        If the body is longer than `DISCARD_LIMIT`, returns nothing, and the connection cannot be
        reused.
        """
        return self.read_body(DISCARD_LIMIT, deadline) or b""

    def patience(self, deadline: float) -> float:
        """Return how many seconds to wait for the first byte of a response to a request sent now.

        After a pause, the connection may be dead, so half of the time is left for a fresh one.
        """
        now = time.monotonic()
        if self.reused and now - self.idle_since >= PAUSE:
            return min(self._stall_timeout, (deadline - now) / 2)
        return self._stall_timeout

    def is_idle(self) -> bool:
        """Return whether the server has neither closed nor sent bytes since the last response."""
        return self.transport.is_idle()

    def interrupt(self) -> None:
        """Abort the call that another thread is blocked in."""
        self.transport.interrupt()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._keep_alive = False
        self.transport.close()

    def _receive_raw_head(self, deadline: float) -> bytes:
        while (end := self._window.find(b"\r\n\r\n", self._start, self._end)) < 0:
            self._read_ahead(deadline)
        head = bytes(self._view[self._start : end + 2])
        self._start = end + 4
        return head

    def _receive_line(self, deadline: float) -> bytes:
        while (end := self._window.find(b"\r\n", self._start, self._end)) < 0:
            self._read_ahead(deadline)
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _receive_chunks(self, buffers: list[memoryview], deadline: float) -> None:
        while size := self._next_chunk(deadline):
            chunk, buffers = split(buffers, size)
            if sum(buffer.nbytes for buffer in chunk) < size:
                raise ProtocolError("chunked body is longer than the object")
            self.fill(self._take_read_ahead(chunk), deadline)
            self._end_chunk(deadline)
        if buffers:
            raise ProtocolError("chunked body is shorter than the object")

    def _read_unsized(self, limit: int, deadline: float) -> bytes | None:
        body = bytearray()
        if not self._chunked:
            with suppress(ClosedError):  # the line break that ends a chunk
                while len(body) <= limit:
                    body += self._view[self._start : self._end]
                    self._start = self._end
                    self._read_ahead(deadline)
            return bytes(body) if len(body) <= limit else None
        while size := self._next_chunk(deadline):
            if len(body) + size > limit:
                return None
            chunk = bytearray(size)
            self.fill(self._take_read_ahead([memoryview(chunk)]), deadline)
            self._end_chunk(deadline)
            body += chunk
        self._unread = 0
        return bytes(body)

    def _next_chunk(self, deadline: float) -> int:
        """Return the size of the next chunk; 0 after the body and its trailer fields."""
        size = parse_chunk_size(self._receive_line(deadline))
        if size == 0:
            for _ in range(TRAILER_LIMIT):
                if not self._receive_line(deadline):
                    return 0
            raise ProtocolError(f"more than {TRAILER_LIMIT} trailer fields")
        return size

    def _end_chunk(self, deadline: float) -> None:
        if self._receive_line(deadline):
            raise ProtocolError("chunk is longer than its size")

    def _read_ahead(self, deadline: float) -> None:
        if self._start:
            held = bytes(self._view[self._start : self._end])
            self._view[: len(held)] = held
            self._start, self._end = 0, len(held)
        if self._end == HEAD_LIMIT:
            raise ProtocolError(f"response head of more than {HEAD_LIMIT} bytes")
        self._end += self._move(self.transport.receive_some, self._view[self._end :], deadline)
        self._silent = False

    def _take_read_ahead(self, buffers: list[memoryview]) -> list[memoryview]:
        """Copy the part of the body that came with the head; return the buffers left to fill."""
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
            raise OutOfTimeError("the deadline passed")
        try:
            limit = self._first_wait if self._silent else self._stall_timeout
            self.transport.set_timeout(min(left, limit))
            count = operation(buffers)
        except TimeoutError as error:
            raise self._timed_out(deadline) from error
        except OSError as error:
            raise self._closed(str(error)) from error
        if count == 0:
            raise self._closed("the server closed the connection")
        return count

    @property
    def _may_be_stale(self) -> bool:
        return self.reused and self._silent

    def _timed_out(self, deadline: float) -> TransferError:
        if time.monotonic() >= deadline:
            return OutOfTimeError("the deadline passed")
        if self._may_be_stale:
            return self._closed("the connection stayed silent")
        self.stalled = True
        return StallError(self._stall_timeout)

    def _closed(self, reason: str) -> TransferError:
        self.stale = self._may_be_stale
        return StaleError(reason) if self.stale else ClosedError(reason)


def advance(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the buffers without their first `count` bytes."""
    return split(buffers, count)[1]


def split(buffers: Sequence[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """Return the first `count` bytes of the buffers, or all if there are fewer, and the rest."""
    first, rest = [], list(buffers)
    while rest and count >= rest[0].nbytes:
        count -= rest[0].nbytes
        first.append(rest.pop(0))
    if rest and count:
        first.append(rest[0][:count])
        rest[0] = rest[0][count:]
    return first, rest
