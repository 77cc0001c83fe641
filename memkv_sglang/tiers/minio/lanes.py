"""Objects received by one thread over several connections, in a loop that does little else.

Between two pages the caches are full of page bytes, and a line of Python costs several times what
it costs in a row. So requests are written before, and heads judged after (`bulk`).
"""

import select
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from memkv_sglang.page import Page, page_checksum
from memkv_sglang.tiers.minio.connection import Connection, advance
from memkv_sglang.tiers.minio.endpoints import Endpoint
from memkv_sglang.tiers.minio.errors import (
    OutOfTimeError,
    ProtocolError,
    StallError,
    StatusError,
    TransferError,
)
from memkv_sglang.tiers.minio.transport import Transport
from memkv_sglang.tiers.minio.wire import parse_head

HEAD_ROOM = 4096
"""Bytes of a response's head at most (MinIO's have 900). What comes of the body is copied."""


class Request(NamedTuple):
    """What to send for a page's object, and where its bytes are to go."""

    number: int
    """Tells the caller's pages apart."""
    page: Page
    head: bytes


class Response(NamedTuple):
    """An object of the right length, received to its last byte. All else is still to be judged."""

    number: int
    head: bytes
    """As the server wrote it, up to the empty line."""
    checksum: bytes
    """Of what is in the page's buffers now."""


class Source(NamedTuple):
    """Where requests come from, and responses go. Must be safe for several threads."""

    take: Callable[[Endpoint], Request | None]
    """Returns the next request for a server, None if there are no more."""
    stop: Callable[[], None]
    """Called when something is not as it should be: no more requests then."""
    deliver: Callable[[Response], None]


def receive(
    connections: Sequence[Connection], source: Source, deadline: float, stall_timeout: float
) -> None:
    """Send requests and receive responses until there are no more.

    A response that is anything but an object of the right length is not delivered, and its
    connection closed where it is not sure to be in step. Blocks until `deadline` at most. Raises
    `OutOfTimeError`, or `StallError` once nothing has moved on any connection for `stall_timeout`
    seconds, and closes those that still had a request under way.
    """
    poll = select.poll()
    # A thread with one connection sleeps until a page is whole: the others have the interpreter.
    until = deadline if len(connections) == 1 else None
    lanes = {connection.transport.fileno: _Lane(connection, until) for connection in connections}
    for fd, lane in list(lanes.items()):
        poll.register(fd, select.POLLIN)
        if not lane.goes_on(source):
            poll.unregister(fd)
            del lanes[fd]
    while lanes:
        left = deadline - time.monotonic()
        ready = poll.poll(max(min(left, stall_timeout), 0) * 1e3)
        if left <= 0 or not ready:
            raise _late(lanes.values(), stall_timeout if left > stall_timeout else None)
        for fd, _ in ready:
            if not lanes[fd].goes_on(source):
                poll.unregister(fd)
                del lanes[fd]


class _Lane:
    """One connection with one request under way."""

    __slots__ = (
        "_body",
        "_buffer",
        "_end",
        "_head",
        "_request",
        "_transport",
        "_until",
        "connection",
    )

    def __init__(self, connection: Connection, until: float | None) -> None:
        self.connection = connection
        self._until = until
        self._transport: Transport = connection.transport
        self._buffer = memoryview(bytearray(HEAD_ROOM))
        self._request: Request | None = None

    def goes_on(self, source: Source) -> bool:
        """Receive what is there, begin the next request after the last byte; False at the end."""
        try:
            if self._request is not None:
                response = self._receive(self._request)
                if response is None:
                    return True
                source.deliver(response)
            return self._begin(source)
        except BlockingIOError:
            return True
        except StatusError:
            source.stop()
            return False
        except (OutOfTimeError, StallError):
            self.connection.close()
            raise
        except (OSError, TransferError):
            self.connection.close()
            source.stop()
            return False

    def _begin(self, source: Source) -> bool:
        self._request = source.take(self.connection.endpoint)
        if self._request is None:
            return False
        self._body = [buffer for buffer in self._request.page.buffers if buffer.nbytes]
        self._head = b""
        self._end = 0
        if not self.connection.quiet():
            raise ProtocolError("more than was asked for")
        self._transport.send_now(self._request.head)
        return True

    def _receive(self, request: Request) -> Response | None:
        """Return the response once it is whole.

        Raises `OSError`, `BlockingIOError` where there is nothing yet; `StatusError` for a refusal
        that was read to its end; `TransferError`.
        """
        while not self._head:
            self._receive_head(request)
        if self._until is not None:
            self.connection.fill(self._body, self._until)
            self._body = []
        while self._body:
            count = self._transport.receive_now(self._body)
            if count == 0:
                raise ProtocolError("closed in mid-body")
            self._body = advance(self._body, count)
            if self._body and not self._transport.holds_more():
                return None
        checksum = page_checksum(request.page.key, request.page.buffers)
        return Response(request.number, self._head, checksum)

    def _receive_head(self, request: Request) -> None:
        count = self._transport.receive_now([self._buffer[self._end :]])
        if count == 0:
            raise ProtocolError("closed, or a head of too many bytes")
        self._end += count
        received = bytes(self._buffer[: self._end])
        head, end, rest = received.partition(b"\r\n\r\n")
        if not end:
            return
        head += b"\r\n"
        if not head.startswith(b"HTTP/1.1 200 "):
            answer = parse_head(head)
            if answer.keep_alive and answer.length == len(rest):
                raise StatusError(answer.status)
            raise ProtocolError("a long refusal")
        if not _frames(head.lower(), request.page.length):
            raise ProtocolError("not what was asked for")
        self._head = head
        if len(rest) > request.page.length:
            raise ProtocolError("more than was asked for")
        while rest:
            count = min(len(rest), len(self._body[0]))
            self._body[0][:count] = rest[:count]
            rest = rest[count:]
            self._body = advance(self._body, count)


def _frames(head: bytes, length: int) -> bool:
    """Tell whether a head in lower case says that so many bytes follow, and then the next one."""
    return (
        b"\r\ncontent-length: %d\r\n" % length in head
        and head.count(b"\r\ncontent-length:") == 1
        and b"\r\ntransfer-encoding:" not in head
        and b"\r\nconnection: close" not in head
    )


def _late(lanes: Iterable[_Lane], stall_timeout: float | None) -> TransferError:
    for lane in lanes:
        lane.connection.stalled = stall_timeout is not None
        lane.connection.close()
    if stall_timeout is None:
        return OutOfTimeError("the deadline came first")
    return StallError(f"nothing moved for {stall_timeout:g} s")
