"""Limits on the content of a message."""

import msgspec
import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.page import Buffer

HASHES = bytes(32 * protocol.MAX_HASHES)
MOVED = bytes(32 * protocol.MAX_PAGES)


def test_largest_messages_are_accepted() -> None:
    page = [Buffer(0, 0, 1)] * protocol.MAX_BUFFERS
    for buffers, good in (
        ([page], True),
        ([[*page, page[0]]], False),
        ([[]] * protocol.MAX_PAGES, True),
        ([[]] * (protocol.MAX_PAGES + 1), False),
    ):
        message = msgspec.msgpack.encode(protocol.LoadPages(b"", b"", buffers))
        try:
            msgspec.msgpack.decode(message, type=protocol.Request)
        except msgspec.ValidationError:
            assert not good
        else:
            assert good


@pytest.mark.parametrize(
    ("longest", "too_long"),
    [
        (protocol.LookupPages(b"", HASHES, None), protocol.LookupPages(b"", HASHES + b"x", None)),
        (protocol.CheckPages(b"", HASHES, None), protocol.CheckPages(b"", HASHES + b"x", None)),
        (protocol.WarmPages(b"", HASHES), protocol.WarmPages(b"", HASHES + b"x")),
        (protocol.LoadPages(b"", MOVED, []), protocol.LoadPages(b"", MOVED + b"x", [])),
        (
            protocol.SpillPages(b"", MOVED, [], HASHES),
            protocol.SpillPages(b"", MOVED, [], HASHES + b"x"),
        ),
        (protocol.Describe(bytes(64 << 10)), protocol.Describe(bytes((64 << 10) + 1))),
        (protocol.Clear(bytes(16)), protocol.Clear(bytes(17))),
        (protocol.Hide(bytes(16)), protocol.Hide(bytes(17))),
    ],
)
def test_oversized_messages_are_rejected(
    longest: protocol.Request, too_long: protocol.Request
) -> None:
    decoder = msgspec.msgpack.Decoder(protocol.Request)
    assert decoder.decode(msgspec.msgpack.encode(longest)) == longest
    with pytest.raises(msgspec.ValidationError, match="length <="):
        decoder.decode(msgspec.msgpack.encode(too_long))
