"""Send messages over a Unix stream socket: a 4-byte little-endian length, then msgpack."""

import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec

from memkv_sglang.agent.protocol import MAX_MESSAGE

HEADER_SIZE = 4

MAX_DESCRIPTORS = 4
"""Maximum descriptors per message. The kernel closes any others."""

BODY_LIMIT = 10.0
"""Seconds in which a message must be complete after its first byte."""

MAX_REASON = 300
"""Maximum length of a decoding error in characters, because it may quote the message."""

_BUFFER_SIZE = 64 << 10
_TIMEVAL = struct.Struct("@ll")
_DESCRIPTOR = struct.Struct("@i")
_ANCILLARY_SIZE = socket.CMSG_SPACE(MAX_DESCRIPTORS * _DESCRIPTOR.size)
_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


class ProtocolError(Exception):
    """The other side sent an invalid frame, or closed in the middle of one."""


class MessageError(ProtocolError):
    """The frame is complete but not a known message. The next one can still be received."""


def encode_frame(message: Any) -> bytearray:
    """Return an encoded message with its length. Raises `ValueError` if it is too long."""
    frame = bytearray(HEADER_SIZE)
    _encoder.encode_into(message, frame, HEADER_SIZE)
    length = len(frame) - HEADER_SIZE
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes exceeds the limit of {MAX_MESSAGE}")
    frame[:HEADER_SIZE] = length.to_bytes(HEADER_SIZE, "little")
    return frame


class Channel(Generic[M]):
    """One end of a connection that carries one request and its reply at a time.

    Not thread-safe. All calls block.
    """

    def __init__(self, sock: socket.socket, decoder: "msgspec.msgpack.Decoder[M]") -> None:
        """Take ownership of the socket, which must be in blocking mode."""
        self._socket = sock
        self._decoder = decoder
        self._buffer = memoryview(bytearray(_BUFFER_SIZE))
        self._descriptors: list[int] = []
        self._descriptors_lost = False
        self._limited = False

    def send(self, frame: bytearray, descriptors: Sequence[int] = ()) -> None:
        """Send an encoded message and duplicates of the descriptors.

        Raises `OSError` if it was not sent completely; the other side then ignores it.
        """
        rest = memoryview(frame)
        if descriptors:
            rest = rest[socket.send_fds(self._socket, [frame], list(descriptors)) :]
        # Without a byte to send, sending fails if the other side has read everything and closed.
        if rest:
            self._socket.sendall(rest)

    def receive(self, deadline: float | None = None) -> M:
        """Return the next message; wait for it until `deadline` (`time.monotonic`).

        Raises `EOFError` if the other side closed between messages, `MessageError` for a frame with
        invalid content, `ProtocolError` for an invalid frame, `TimeoutError` at the deadline, and
        `OSError` if the connection fails.
        """
        self._close_descriptors()
        self._limit(deadline)
        count = self._receive_first()
        length = int.from_bytes(self._buffer[:HEADER_SIZE], "little") if count >= 4 else None
        if length is not None and count == HEADER_SIZE + length:
            return self._decode(self._buffer[HEADER_SIZE:count])
        body_deadline = time.monotonic() + BODY_LIMIT
        limit = body_deadline if deadline is None else min(deadline, body_deadline)
        return self._decode(self._receive_rest(count, limit))

    def _receive_first(self) -> int:
        """Receive the available bytes into the buffer, and any descriptors."""
        try:
            count, ancillary, flags, _ = self._socket.recvmsg_into(
                [self._buffer], _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise TimeoutError("no message before the deadline") from None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) - len(data) % _DESCRIPTOR.size
                self._descriptors += (fd for (fd,) in _DESCRIPTOR.iter_unpack(data[:whole]))
        self._descriptors_lost = bool(flags & socket.MSG_CTRUNC)
        if count == 0:
            raise EOFError
        return count

    def _receive_rest(self, count: int, deadline: float) -> memoryview:
        """Return the body of a message whose first `count` bytes are in the buffer."""
        if count < HEADER_SIZE:
            self._receive_exactly(self._buffer[count:HEADER_SIZE], deadline)
            count = HEADER_SIZE
        length = int.from_bytes(self._buffer[:HEADER_SIZE], "little")
        if length > MAX_MESSAGE:
            raise ProtocolError(f"a message of {length} bytes exceeds the limit of {MAX_MESSAGE}")
        if count > HEADER_SIZE + length:
            raise ProtocolError("bytes after the end of the message")
        # The buffer grows as bytes arrive, so merely announcing a long message uses no memory.
        body = bytearray(self._buffer[HEADER_SIZE:count])
        while len(body) < length:
            piece = self._buffer[: min(length - len(body), _BUFFER_SIZE)]
            self._receive_exactly(piece, deadline)
            body += piece
        return memoryview(body)

    def _receive_exactly(self, target: memoryview, deadline: float) -> None:
        while target:
            self._limit(deadline)
            try:
                count = self._socket.recv_into(target)
            except BlockingIOError:
                raise TimeoutError("the message was not completed in time") from None
            if count == 0:
                raise ProtocolError("the connection was closed in the middle of a message")
            target = target[count:]

    def _decode(self, body: memoryview) -> M:
        if self._descriptors_lost:
            self._close_descriptors()
            raise MessageError(
                f"descriptors were lost: a message may carry {MAX_DESCRIPTORS}, and the receiver's "
                "limit of open files must allow them (ulimit -n)"
            )
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._close_descriptors()
            raise MessageError(str(error)[:MAX_REASON]) from None

    def _limit(self, deadline: float | None) -> None:
        """Let the kernel time out receive calls, which is cheaper than polling before each."""
        if deadline is None and not self._limited:
            return
        self._limited = deadline is not None
        seconds = 0.0 if deadline is None else max(1e-3, deadline - time.monotonic())
        whole = int(seconds)
        value = _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)

    def limit_send(self, seconds: float) -> None:
        """Make `send` raise after `seconds` without progress."""
        value = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def claim_descriptors(self) -> list[int]:
        """Return the descriptors that came with the last message; the caller must close them."""
        claimed, self._descriptors = self._descriptors, []
        return claimed

    def stop_receiving(self) -> None:
        """Make `receive` raise `EOFError` after the data received so far. Thread-safe."""
        with suppress(OSError):  # the other side may have closed the connection already
            self._socket.shutdown(socket.SHUT_RD)

    def _close_descriptors(self) -> None:
        for descriptor in self.claim_descriptors():
            os.close(descriptor)

    def close(self) -> None:
        """Close the socket and unclaimed descriptors. Idempotent."""
        self._close_descriptors()
        self._socket.close()
