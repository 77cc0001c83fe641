"""The append-only record of what became of slots, so that a restart need not read the disk.

A frame, little-endian: magic (4), kind (1), zero (3), payload length (8), XXH3-64 of the 16 bytes
before and the payload (8), payload. The first frame of a journal is `START`. A frame is appended
with one write, and is in the kernel's hands when the call returns: it survives a kill of the
process. The payload is a sequence of records of one kind, fixed in size.
"""

import enum
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

_MAGIC = b"MKVJ"
_HEAD = struct.Struct("<4sB3xQ")
_SEAL = struct.Struct("<Q")
_FRAME_SIZE = _HEAD.size + _SEAL.size

UNFINISHED_SUFFIX = ".new"
"""Ends the name of a journal that is still being written."""

PUT = struct.Struct("<16s32sIIQQ")
"""Namespace digest, page hash, segment, slot, content length, tick of last use."""
SLOT = struct.Struct("<II")
"""Segment, slot: the record of `FREE`, `PENDING` and `UPLOADED`."""


class Kind(enum.IntEnum):
    """What a frame's records say."""

    START = 0
    """Nothing: the journal begins here, and is whole if it has this frame."""
    PUT = 1
    """Pages lie in slots. Takes the place of whatever lay there, or of the page elsewhere."""
    FREE = 2
    """Slots hold no page. Written before a slot is written over."""
    PENDING = 3
    """The pages in these slots wait for upload."""
    UPLOADED = 4
    """They wait no more."""


class Frame(NamedTuple):
    """One batch of records."""

    kind: int
    payload: memoryview


class Journal:
    """An open journal. Not thread-safe: callers hold the catalog's lock for changes."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        """Take over an open file whose first `size` bytes are whole frames."""
        self.path = path
        self.size = size
        """Bytes of whole frames."""
        self.copies: list[bytes] | None = None
        """While a list: frames appended are added to it as well, for the journal's successor."""
        self._fd = fd

    @classmethod
    def create(cls, path: Path) -> "Journal":
        """Begin a journal, over whatever was at the path. Raises `OSError`."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        journal = cls(path, fd, 0)
        try:
            journal.append(Kind.START, b"")
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, size: int) -> "Journal":
        """Go on behind the whole frames of a journal; what follows them is cut off."""
        fd = os.open(path, os.O_RDWR)
        os.ftruncate(fd, size)
        return cls(path, fd, size)

    def append(self, kind: Kind, payload: bytes) -> None:
        """Append a frame. Raises `OSError`; the journal is then as before."""
        frame = _encode(kind, payload)
        self._write(frame)
        if self.copies is not None:
            self.copies.append(frame)

    def append_frames(self, frames: Sequence[bytes]) -> None:
        """Append the `copies` that another journal took."""
        self._write(b"".join(frames))

    def _write(self, frame: bytes) -> None:
        # At a known offset: what a failed write leaves is written over by the next one.
        written = 0
        while written < len(frame):
            written += os.pwrite(self._fd, frame[written:], self.size + written)
        self.size += len(frame)

    def rename(self, path: Path) -> None:
        """Move the file, over another journal's. Raises `OSError`."""
        self.path.rename(path)
        self.path = path

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class JournalDamagedError(Exception):
    """A journal that is missing, has no beginning, or is damaged before its end."""


def read_journal(path: Path) -> tuple[list[Frame], int]:
    """Return the frames and their bytes altogether, without a torn frame at the end.

    Raises `JournalDamagedError`, `OSError`.
    """
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise JournalDamagedError("is missing") from None
    frames, size = [], 0
    for frame, end in _frames(content, 0):
        frames.append(frame)
        size = end
    if not frames or frames[0].kind != Kind.START:
        raise JournalDamagedError("has no beginning")
    if _has_frame_behind(content, size):
        raise JournalDamagedError(f"is damaged at offset {size}")
    return frames, size


def _encode(kind: Kind, payload: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, kind, len(payload))
    return b"".join((head, _SEAL.pack(xxhash.xxh3_64_intdigest(head + payload)), payload))


def _frames(content: memoryview, offset: int) -> Iterator[tuple[Frame, int]]:
    """Yield frames with their ends, up to the first that is not whole."""
    while offset + _FRAME_SIZE <= len(content):
        magic, kind, length = _HEAD.unpack_from(content, offset)
        end = offset + _FRAME_SIZE + length
        if magic != _MAGIC or end > len(content):
            return
        payload = content[offset + _FRAME_SIZE : end]
        hasher = xxhash.xxh3_64(content[offset : offset + _HEAD.size])
        hasher.update(payload)
        if _SEAL.unpack_from(content, offset + _HEAD.size) != (hasher.intdigest(),):
            return
        yield Frame(kind, payload), end
        offset = end


def _has_frame_behind(content: memoryview, offset: int) -> bool:
    """Tell whether a whole frame follows somewhere: then what is at `offset` is no torn end."""
    rest = bytes(content[offset:])
    found = rest.find(_MAGIC, 1)
    while found >= 0:
        if next(_frames(content, offset + found), None) is not None:
            return True
        found = rest.find(_MAGIC, found + 1)
    return False
