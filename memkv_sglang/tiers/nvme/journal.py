"""The journal: an append-only log of slot changes, with which a restart need not scan the disk.

A frame, little-endian: magic (4), kind (1), zero (3), payload length (8), XXH3-64 of the preceding
16 bytes and the payload (8), payload. The first frame of a journal is `START`. The payload is a
sequence of fixed-size records of one kind, at most `MAX_PAYLOAD` bytes; more records take several
frames. A frame is appended with one write. When the call returns, the kernel has the frame, so it
survives a kill of the process.
"""

import enum
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import xxhash

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.files import UNFINISHED_SUFFIX, Folder
from memkv_sglang.tiers.nvme.footer import MAX_LENGTH, MAX_TICK

JOURNAL = "journal"
"""The journal's file name."""

_MAGIC = b"MKVJ"
_HEAD = struct.Struct("<4sB3xQ")
_SEAL = struct.Struct("<Q")
_FRAME_SIZE = _HEAD.size + _SEAL.size

PUT = struct.Struct("<16s32sIIQQ")
"""The record of `PUT`: namespace digest, page hash, segment, slot, content length, tick of last
use."""
SLOT = struct.Struct("<II")
"""The record of `FREE`, `PENDING` and `UPLOADED`: segment, slot."""


MAX_PAYLOAD = (1 << 20) // PUT.size * PUT.size
"""Maximum bytes of a payload. A multiple of both record sizes."""

_TORN_LIMIT = 64 << 20
"""Maximum bytes that an interrupted write may leave after the last complete frame."""


class Kind(enum.IntEnum):
    """The meaning of a frame's records."""

    START = 0
    """The journal starts here. Has no records."""
    PUT = 1
    """Pages are stored in these slots. They replace earlier content of the slots, and earlier
    copies."""
    FREE = 2
    """These slots are free. Written before a slot is overwritten."""
    PENDING = 3
    """The pages in these slots are pending upload."""
    UPLOADED = 4
    """The pages in these slots are no longer pending."""
    SNAPSHOT_END = 5
    """The snapshot at the start of the journal ends here. Has no records."""


_RECORD_SIZES = {
    Kind.START: 0,
    Kind.PUT: PUT.size,
    Kind.FREE: SLOT.size,
    Kind.PENDING: SLOT.size,
    Kind.UPLOADED: SLOT.size,
    Kind.SNAPSHOT_END: 0,
}


class Frame(NamedTuple):
    """A batch of records of the same kind. The payload has only complete records."""

    kind: Kind
    payload: bytes


class Put(NamedTuple):
    """A `PUT` record: a page in a slot."""

    key: PageKey
    segment: int
    slot: int
    length: int
    tick: int


def read_puts(payload: bytes) -> Iterator[tuple[PageKey, int, int, int, int]]:
    """Yield the fields of a `PUT` frame's records. Skips records with impossible values."""
    for namespace, page_hash, segment, slot, length, tick in PUT.iter_unpack(payload):
        if length <= MAX_LENGTH and tick <= MAX_TICK:
            yield PageKey(namespace, page_hash), segment, slot, length, tick


class Journal:
    """An open journal. The caller must hold the catalog's `changes` lock."""

    def __init__(self, folder: Folder, name: str, fd: int, size: int) -> None:
        """Own an open file whose first `size` bytes are complete frames."""
        self.size = size
        """Bytes of complete frames."""
        self.copies: list[bytes] | None = None
        """If this is a list, appended frames are also added to it, for the journal that will
        succeed this one."""
        self.folder = folder
        self._name = name
        self._fd = fd

    @classmethod
    def create(cls, folder: Folder, name: str = JOURNAL) -> "Journal":
        """Create a journal, replacing any file of this name. Leaves none if it raises `OSError`."""
        fd = folder.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        journal = cls(folder, name, fd, 0)
        try:
            journal.append(Kind.START, b"")
        except OSError:
            journal.discard()
            raise
        return journal

    @classmethod
    def begin_successor(cls, folder: Folder) -> "Journal":
        """Create the journal that will replace the current one. Raises `OSError`."""
        return cls.create(folder, JOURNAL + UNFINISHED_SUFFIX)

    @classmethod
    def resume(cls, folder: Folder, size: int) -> "Journal":
        """Open an existing journal for appending. Truncates it after `size` bytes."""
        fd = folder.open(JOURNAL, os.O_RDWR)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        return cls(folder, JOURNAL, fd, size)

    def append(self, kind: Kind, payload: bytes) -> None:
        """Append records with one write. If this raises `OSError`, the journal is unchanged."""
        starts = range(0, max(len(payload), 1), MAX_PAYLOAD)
        frames = b"".join(_encode(kind, payload[i : i + MAX_PAYLOAD]) for i in starts)
        self._write(frames)
        if self.copies is not None:
            self.copies.append(frames)

    def append_frames(self, frames: Sequence[bytes]) -> None:
        """Append frames that another journal collected in `copies`."""
        self._write(b"".join(frames))

    def _write(self, frames: bytes) -> None:
        # Write at a known offset, so that the next write overwrites what a failed one has left.
        written = 0
        while written < len(frames):
            written += os.pwrite(self._fd, frames[written:], self.size + written)
        self.size += len(frames)

    def take_over(self) -> None:
        """Rename this journal over its predecessor. Raises `OSError`."""
        self.folder.rename(self._name, JOURNAL)
        self._name = JOURNAL

    def is_in_place(self) -> bool:
        """Return whether the journal is still at its path, where the next start reads it."""
        try:
            found = self.folder.status(self._name)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def sync(self) -> None:
        """Wait until all frames are on disk."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def discard(self) -> None:
        """Close the file and remove it."""
        self.close()
        with suppress(OSError):
            self.folder.remove(self._name)


class JournalDamagedError(Exception):
    """The journal is missing, has no start frame, or is damaged before its end."""


def read_journal(folder: Folder) -> tuple[list[Frame], int]:
    """Return the frames and their total bytes. Ignores a torn frame at the end.

    Raises `JournalDamagedError` and `OSError`.
    """
    try:
        descriptor = folder.open_to_read(JOURNAL)
    except FileNotFoundError:
        raise JournalDamagedError("is missing") from None
    with os.fdopen(descriptor, "rb", buffering=1 << 20) as file:
        frames, size = _read_frames(file)
        if not frames or frames[0].kind != Kind.START:
            raise JournalDamagedError("has no start frame")
        if all(frame.kind != Kind.SNAPSHOT_END for frame in frames):
            raise JournalDamagedError("ends within its snapshot")
        file.seek(size)
        # Limit the read, because a sparse file may be longer than the memory.
        rest = file.read(_TORN_LIMIT + 1)
    if len(rest) > _TORN_LIMIT or _contains_frame(rest):
        raise JournalDamagedError(f"is damaged at offset {size}")
    return frames, size


def _encode(kind: Kind, payload: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, kind, len(payload))
    return b"".join((head, _SEAL.pack(xxhash.xxh3_64_intdigest(head + payload)), payload))


def _read_frames(file: BinaryIO) -> tuple[list[Frame], int]:
    """Return the frames before the first incomplete or damaged one, and that one's offset."""
    frames: list[Frame] = []
    size = 0
    while (head := _parse_head(file.read(_FRAME_SIZE))) is not None:
        payload = file.read(head.length)
        if not head.confirms(payload):
            break
        frames.append(Frame(head.kind, payload))
        size += _FRAME_SIZE + head.length
    return frames, size


class _Head(NamedTuple):
    kind: Kind
    length: int
    fields: bytes
    seal: int

    def confirms(self, payload: bytes) -> bool:
        """Return whether the payload is complete and has the frame's checksum."""
        if len(payload) != self.length:
            return False
        return xxhash.xxh3_64_intdigest(self.fields + payload) == self.seal


def _parse_head(block: bytes) -> _Head | None:
    """Parse the head of a frame; return None if its kind or length is impossible."""
    if len(block) != _FRAME_SIZE:
        return None
    magic, kind, length = _HEAD.unpack_from(block)
    if magic != _MAGIC or kind not in _RECORD_SIZES or length > MAX_PAYLOAD:
        return None
    record_size = _RECORD_SIZES[kind]
    if length % record_size if record_size else length:
        return None
    (seal,) = _SEAL.unpack_from(block, _HEAD.size)
    return _Head(Kind(kind), length, block[: _HEAD.size], seal)


def _contains_frame(rest: bytes) -> bool:
    """Return whether `rest` contains a complete frame, so that it is not just a torn end."""
    found = rest.find(_MAGIC, 1)
    while found >= 0:
        payload = found + _FRAME_SIZE
        head = _parse_head(rest[found:payload])
        if head is not None and head.confirms(rest[payload : payload + head.length]):
            return True
        found = rest.find(_MAGIC, found + 1)
    return False
