"""Fuzz the parsers of outside input: they must refuse damaged input, or read it correctly.

A target provides valid inputs and a reader. The fuzzer damages an input (bits, bytes, cuts, pieces
moved or repeated) and reads it. The reader may raise what its docstring says, or return what is
still correct. Anything else is a failure.
"""

import random
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.wire import HEADER_SIZE, Channel, MessageError, ProtocolError, encode_frame
from memkv_sglang.page import Buffer, PageKey
from memkv_sglang.tiers.minio.http.errors import ProtocolError as HttpError
from memkv_sglang.tiers.minio.http.framing import parse_head
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.footer import Footer
from memkv_sglang.tiers.nvme.journal import (
    JOURNAL,
    PUT,
    SLOT,
    Journal,
    JournalDamagedError,
    Kind,
    read_journal,
)
from memkv_sglang.tiers.nvme.segment import DamagedSegmentError, create_segment, open_segment

MEMORY = "/dev/shm"  # noqa: S108 - a directory of our own is made in it
"""Directory for inputs that must be files. It is in memory, because a disk would slow the fuzzer
down."""

Read = Callable[[bytes], bool]
"""Reads an input; returns whether it was accepted. Asserts that accepted input is correct."""


def damage_one(valid: Sequence[bytes], chance: random.Random) -> bytes:
    """Return a damaged copy of one of the inputs."""
    return damage(chance.choice(valid), chance)


class Target(NamedTuple):
    """A parser to fuzz."""

    name: str
    prepare: Callable[[Path], tuple[list[bytes], Read]]
    """Returns valid inputs and the reader. May write to the directory."""
    share: float = 1.0
    """Share of the requested inputs to try. It is smaller if inputs are files."""
    make: Callable[[Sequence[bytes], random.Random], bytes] = damage_one
    """Makes an input from the valid inputs."""


class Fuzzed(NamedTuple):
    """The counts of one target."""

    inputs: int
    taken: int
    """Number of inputs that were accepted, and are correct."""


def fuzz(target: Target, inputs: int, seed: int = 0) -> Fuzzed:
    """Read damaged inputs. Equal seeds give equal inputs. Raises what the reader raises."""
    chance = random.Random(f"{target.name} {seed}")  # noqa: S311 - not a secret
    count = max(int(inputs * target.share), 1)
    with tempfile.TemporaryDirectory(prefix="memkv-fuzz-", dir=MEMORY) as directory:
        valid, read = target.prepare(Path(directory))
        assert all(map(read, valid)), f"{target.name} refuses what is valid"
        taken = 0
        for _ in range(count):
            taken += read(target.make(valid, chance))
    return Fuzzed(count, taken)


ODD_NUMBERS = (0, 1, -1, 255, 2**31, 2**32, 2**63 - 1, 2**64 - 1, -(2**63))
ODD_FLOATS = (0.0, -0.0, 1e-300, 1e308, -1.0, float("inf"), float("-inf"), float("nan"))
ODD_LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 4096)
DEEP = (1, 10, 100, 3000, 20_000)
"""Depths of nested values, which must fit into a socket's buffer."""


def odd_value(chance: random.Random) -> bytes:
    """Return valid msgpack of some type, often an unexpected one."""
    encode = msgspec.msgpack.encode
    match chance.randrange(9):
        case 0:
            return encode(chance.choice(ODD_NUMBERS))
        case 1:
            return encode(chance.choice(ODD_FLOATS))
        case 2:
            return encode(chance.randbytes(chance.choice(ODD_LENGTHS)))
        case 3:
            return encode("é[b]\n\0" * chance.choice((0, 1, 100)))
        case 4:
            return encode(chance.choice((None, True, False)))
        case 5:
            depth = chance.choice(DEEP)
            return chance.choice((b"\x91", b"\x81\xa1a")) * depth + b"\xc0"
        case 6:
            return encode(
                [[[chance.choice(ODD_NUMBERS) for _ in range(3)]] * chance.choice((0, 2))]
            )
        case 7:
            return encode({"a": chance.choice(ODD_NUMBERS)})
        case _:
            return encode(msgspec.msgpack.Ext(chance.randrange(-128, 128), chance.randbytes(5)))


def odd_request(requests: Sequence[protocol.Request], chance: random.Random) -> bytes:
    """Return the frame of a request with wrong, missing or extra fields."""
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(chance.choice(requests)))
    encoded = [msgspec.msgpack.encode(field) for field in fields]
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(encoded) + 1)
        if chance.random() < 0.2:
            del encoded[at : at + 1]
        elif at == len(encoded) or chance.random() < 0.2:
            encoded.insert(at, odd_value(chance))
        else:
            encoded[at] = odd_value(chance)
    body = bytes([0x90 | len(encoded)]) + b"".join(encoded)
    return len(body).to_bytes(HEADER_SIZE, "little") + body


def damage(content: bytes, chance: random.Random) -> bytes:
    """Return the content with one to three random damages."""
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        at = chance.randrange(len(damaged) + 1)
        length = min(chance.choice((1, 2, 4, 8, 40)), len(damaged) - at)
        match chance.randrange(6):
            case 0 if at < len(damaged):
                damaged[at] ^= 1 << chance.randrange(8)
            case 1:
                damaged[at : at + length] = chance.randbytes(length)
            case 2:
                del damaged[at : at + length]
            case 3:
                damaged[at:at] = chance.randbytes(length)
            case 4:
                damaged[at:at] = damaged[: chance.randrange(len(damaged) + 1)][-64:]
            case _:
                del damaged[at:]
    return bytes(damaged)


KEY = PageKey(bytes(range(16)), bytes(range(100, 132)))


REQUESTS: list[protocol.Request] = [
    protocol.Hello(protocol.PROTOCOL_VERSION, b"t" * 16),
    protocol.RegisterPool(1, 1 << 20),
    protocol.ReleasePool(1),
    protocol.LookupPages(KEY.namespace, KEY.hash * 3, 0.1),
    protocol.LoadPages(KEY.namespace, KEY.hash * 2, [[Buffer(0, 0, 4096)]] * 2),
    protocol.SpillPages(KEY.namespace, KEY.hash, [[Buffer(0, 0, 64), Buffer(0, 64, 64)]], b""),
    protocol.Describe(b"{}"),
    protocol.CheckPages(KEY.namespace, KEY.hash, None, "nvme"),
    protocol.WarmPages(KEY.namespace, KEY.hash),
    protocol.Clear(KEY.namespace),
    protocol.Hide(KEY.namespace),
    protocol.Flush(1.5),
    protocol.Status(),
    protocol.Settings(b"n" * 32),
    protocol.Join(),
    protocol.Retire(),
]
"""A message of each kind except `Shutdown`."""


def _messages(_: Path) -> tuple[list[bytes], Read]:
    """Return valid messages with their framing, as a connection receives them."""
    decoder = msgspec.msgpack.Decoder(protocol.Request)

    def read(content: bytes) -> bool:
        here, there = socket.socketpair()
        channel: Channel[Any] = Channel(there, decoder)
        try:
            here.sendall(content)
            here.close()
            frame = encode_frame(channel.receive())
            # An accepted message survives a round trip.
            assert encode_frame(decoder.decode(frame[HEADER_SIZE:])) == frame
        except (MessageError, ProtocolError, EOFError):
            return False
        finally:
            channel.close()
            here.close()
        return True

    return [bytes(encode_frame(request)) for request in REQUESTS], read


def _footers(_: Path) -> tuple[list[bytes], Read]:
    footers = [Footer(KEY, length, length * 3, bytes(16)) for length in (1, 4096, 1 << 33)]
    blocks = []
    for footer in footers:
        block = bytearray(BLOCK)
        footer.pack_into(memoryview(block))
        blocks.append(bytes(block))

    def read(content: bytes) -> bool:
        block = content[:BLOCK].ljust(BLOCK, b"\0")  # the tier always reads whole blocks
        footer = Footer.unpack(memoryview(block))
        assert footer is None or footer in footers
        return footer is not None

    return blocks, read


def _heads(_: Path) -> tuple[list[bytes], Read]:
    """Return heads of MinIO's responses. Damage shows only in their form or the page's checksum."""
    heads = [
        b'HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\nETag: "0123"\r\n'
        b"x-amz-meta-memkv-format: 1\r\nx-amz-meta-memkv-length: 1048576\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 300\r\nServer: MinIO\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 60\r\n",
        b"HTTP/1.1 204 No Content\r\nConnection: close\r\n",
    ]

    def read(content: bytes) -> bool:
        try:
            head = parse_head(content + b"\r\n")
            head.field(b"x-amz-meta-memkv-format")
            assert head.retry_after >= 0
        except HttpError:
            return False
        assert 200 <= head.status <= 999
        assert 0 <= head.length < 10**18
        return True

    return heads, read


def _journals(directory: Path) -> tuple[list[bytes], Read]:
    path = directory / JOURNAL
    folder = Folder.at(directory)
    journal = Journal.create(folder)
    records = [PUT.pack(*KEY, 0, slot, 4096, slot) for slot in range(4)]
    frames = [
        (Kind.SNAPSHOT_END, b""),
        (Kind.PUT, b"".join(records)),
        (Kind.PENDING, SLOT.pack(0, 1)),
        (Kind.UPLOADED, SLOT.pack(0, 1)),
        (Kind.FREE, SLOT.pack(0, 2)),
    ]
    for kind, payload in frames:
        journal.append(kind, payload)
    journal.close()
    written = [(Kind.START, b""), *frames]

    def read(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            found, size = read_journal(folder)
        except JournalDamagedError:
            return False
        # A kill may tear off frames at the end, and damage may repeat or drop whole frames, but
        # every frame that is read was written like that.
        assert size <= len(content)
        assert all((frame.kind, bytes(frame.payload)) in written for frame in found)
        return True

    return [path.read_bytes()], read


def _segments(directory: Path) -> tuple[list[bytes], Read]:
    folder = Folder.at(directory)
    segment = create_segment(folder, 3, 2 * BLOCK, 2, direct=False)
    name = segment.path.name
    segment.close()

    def read(content: bytes) -> bool:
        segment.path.write_bytes(content)
        try:
            opened = open_segment(folder, name, largest=8 * BLOCK, direct=False)
        except DamagedSegmentError:
            return False
        opened.close()
        assert (opened.number, opened.slot_size, len(opened.slots)) == (3, 2 * BLOCK, 2)
        return True

    return [segment.path.read_bytes()[: BLOCK + 64]], read


TARGETS = [
    Target("protocol messages", _messages),
    Target("odd requests", _messages, 0.2, lambda _, chance: odd_request(REQUESTS, chance)),
    Target("NVMe footers", _footers),
    Target("HTTP response heads", _heads),
    Target("NVMe journals", _journals, share=0.5),
    Target("segment headers", _segments, share=0.2),
]
