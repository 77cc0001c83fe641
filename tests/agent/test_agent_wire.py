"""Framing: messages arrive unchanged, and garbage closes only its own connection."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memkv_sglang.agent import protocol, wire
from memkv_sglang.agent.wire import Channel, ProtocolError, encode_frame
from memkv_sglang.page import Buffer
from tests.agent.agent_harness import entries

Ends = tuple[socket.socket, Channel[protocol.Request]]


def make_ends() -> Ends:
    ours, theirs = socket.socketpair()
    return ours, Channel(theirs, msgspec.msgpack.Decoder(protocol.Request))


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, channel = make_ends()
    with ours:
        yield ours, channel
    channel.close()


def soon() -> float:
    return time.monotonic() + 5


REQUESTS: list[protocol.Request] = [
    protocol.Hello(1, b"token"),
    protocol.LoadPages(b"n" * 16, b"h" * 64, [[Buffer(0, 4096, 8192), Buffer(1, 0, 1)], []]),
    protocol.LookupPages(b"n" * 16, b"h" * 32 * 20_000, 0.25),  # larger than a socket buffer
    protocol.Status(),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_message_round_trip(ends: Ends, request_: protocol.Request) -> None:
    ours, channel = ends
    sender = threading.Thread(target=ours.sendall, args=(encode_frame(request_),))
    sender.start()
    assert channel.receive(soon()) == request_
    sender.join()


def test_message_can_arrive_byte_by_byte(ends: Ends) -> None:
    ours, channel = ends

    def trickle() -> None:
        for byte in encode_frame(REQUESTS[1]):
            ours.send(bytes([byte]))

    sender = threading.Thread(target=trickle)
    sender.start()
    assert channel.receive(soon()) == REQUESTS[1]
    sender.join()


def test_field_added_by_a_later_version_is_ignored(ends: Ends) -> None:
    ours, channel = ends
    body = msgspec.msgpack.encode([0, 7, b"", "something new"])
    ours.sendall(len(body).to_bytes(4, "little") + body)
    assert channel.receive(soon()) == protocol.Hello(7)


def test_descriptors_arrive_and_unclaimed_ones_are_closed(ends: Ends) -> None:
    ours, channel = ends
    before = entries("/proc/self/fd")
    for _ in range(3):
        send_with_memories(ours, wire.MAX_DESCRIPTORS)
        channel.receive(soon())
    claimed = channel.claim_descriptors()
    assert len(claimed) == wire.MAX_DESCRIPTORS
    assert not any(os.get_inheritable(descriptor) for descriptor in claimed)
    for descriptor in claimed:
        os.close(descriptor)
    assert entries("/proc/self/fd") == before


def test_message_with_lost_descriptors_is_refused_and_leaks_none(ends: Ends) -> None:
    ours, channel = ends
    before = entries("/proc/self/fd")
    for _ in range(3):
        send_with_memories(ours, wire.MAX_DESCRIPTORS + 5)
        with pytest.raises(wire.MessageError, match="descriptors were lost"):
            channel.receive(soon())
        assert entries("/proc/self/fd") == before
    ours.sendall(encode_frame(protocol.Status()))
    assert channel.receive(soon()) == protocol.Status()


def send_with_memories(sock: socket.socket, count: int) -> None:
    descriptors = [os.memfd_create("x") for _ in range(count)]
    socket.send_fds(sock, [encode_frame(protocol.Status())], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def test_close_between_messages_is_an_orderly_end(ends: Ends) -> None:
    ours, channel = ends
    ours.close()
    with pytest.raises(EOFError):
        channel.receive(soon())


@pytest.mark.parametrize("size", [1, 4, 6])
def test_close_within_a_message_is_an_error(ends: Ends, size: int) -> None:
    ours, channel = ends
    ours.sendall(encode_frame(protocol.Hello(1, b"token"))[:size])
    ours.close()
    with pytest.raises(ProtocolError):
        channel.receive(soon())


def test_message_over_the_limit_is_refused_unread(ends: Ends) -> None:
    ours, channel = ends
    ours.sendall((protocol.MAX_MESSAGE + 1).to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        channel.receive(soon())
    with pytest.raises(ValueError, match="exceeds the limit"):
        encode_frame(protocol.Describe(bytes(protocol.MAX_MESSAGE)))


def test_invalid_utf8_is_a_message_error(ends: Ends) -> None:
    ours, channel = ends
    body = msgspec.msgpack.encode([11, b"n", b"h", None, "nvme"]).replace(b"nvme", b"nv\xcce")
    ours.sendall(len(body).to_bytes(4, "little") + body)
    with pytest.raises(wire.MessageError):
        channel.receive(soon())


def test_receive_times_out_at_the_deadline(ends: Ends) -> None:
    ours, channel = ends
    with pytest.raises(TimeoutError):
        channel.receive(time.monotonic() + 0.02)
    ours.sendall(b"\x09")
    with pytest.raises(TimeoutError):
        channel.receive(time.monotonic() + 0.02)


@given(st.binary(max_size=200))
@example(b"\x00\x00\x00\x00")
@example(bytes(encode_frame(protocol.Status())) * 2)
def test_garbage_is_a_protocol_error_or_a_message(garbage: bytes) -> None:
    ours, channel = make_ends()
    with ours:
        ours.sendall(garbage)
        ours.shutdown(socket.SHUT_WR)
        with suppress(ProtocolError, EOFError):
            channel.receive(soon())
    channel.close()


@given(st.data())
def test_garbage_in_a_frame_is_a_protocol_error_or_a_message(data: st.DataObject) -> None:
    body = bytearray(encode_frame(data.draw(st.sampled_from([REQUESTS[i] for i in (0, 1, 3)])))[4:])
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), max_size=4)):
        body[place] = data.draw(st.integers(0, 255))
    ours, channel = make_ends()
    with ours:
        ours.sendall(len(body).to_bytes(4, "little") + body)
        with suppress(ProtocolError):
            channel.receive(soon())
    channel.close()
