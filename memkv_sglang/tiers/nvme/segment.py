"""Segment files: preallocated files with a header block and then slots of one size.

Header, little-endian, one block: magic (8), format version (4), segment number (4), slot size (8),
slots (8), XXH3-128 of the preceding bytes (16), zeros.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from memkv_sglang.tiers.nvme.disk import direct_io
from memkv_sglang.tiers.nvme.disk.base import DiskRequest
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK, aligned_memory, is_aligned
from memkv_sglang.tiers.nvme.files import UNFINISHED_SUFFIX, Folder
from memkv_sglang.tiers.nvme.slots import SlotMap

HEADER_SIZE = BLOCK
FORMAT_VERSION = 1
MAX_SIZE = 1 << 36
"""Maximum bytes of a segment, and of `nvme.segment_size`."""
_MAGIC = b"MKVSEGM\0"
_FIELDS = struct.Struct("<8sIIQQ")
_SEAL_SIZE = 16
_LOCK_PAUSE = 0.01


class Segment:
    """An open segment file and the state of its slots."""

    __slots__ = (
        "direct",
        "fd",
        "intact_slots",
        "number",
        "path",
        "retiring",
        "slot_size",
        "slots",
    )

    def __init__(
        self, path: Path, fd: int, number: int, slot_size: int, slots: int, *, direct: bool
    ) -> None:
        """Own an open file. `direct` says whether it was opened with O_DIRECT."""
        self.path = path
        self.fd = fd
        self.number = number
        self.slot_size = slot_size
        self.slots = SlotMap(slots)
        self.direct = direct
        self.retiring = False
        """Whether the segment is being removed. If so, its free slots must not be used."""
        self.intact_slots = slots
        """Number of slots that the file contained when it was opened. The others were lost to
        truncation."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + len(self.slots) * self.slot_size

    @property
    def taken_bytes(self) -> int:
        """Bytes of the slots that are taken."""
        return (len(self.slots) - self.slots.free) * self.slot_size

    def offset(self, slot: int) -> int:
        """Return the file offset of a slot."""
        return HEADER_SIZE + slot * self.slot_size

    def takes(self, buffers: Sequence[memoryview]) -> bool:
        """Return whether I/O can use these buffers directly, without a bounce buffer."""
        return not self.direct or is_aligned(buffers)

    def read(self, vectors: Sequence[memoryview], slot: int) -> DiskRequest:
        """Return a request that fills the vectors, from the start of a slot."""
        return DiskRequest(self.fd, vectors, self.offset(slot), writes=False)

    def read_footer(self, block: memoryview, slot: int) -> DiskRequest:
        """Return a request that fills a block from the last block of a slot."""
        return DiskRequest(self.fd, [block], self.offset(slot + 1) - len(block), writes=False)

    def write(self, vectors: Sequence[memoryview], slot: int) -> DiskRequest:
        """Return a request that writes the vectors to the start of a slot."""
        return DiskRequest(self.fd, vectors, self.offset(slot), writes=True)

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class Place(NamedTuple):
    """A slot on disk."""

    segment: Segment
    slot: int


class DamagedSegmentError(Exception):
    """The file is not a segment, or its header is damaged."""


class LostHeaderError(DamagedSegmentError):
    """The header is damaged, so what the file contains is unknown."""


class Header(NamedTuple):
    """The header of a segment file."""

    number: int
    slot_size: int
    slots: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + self.slots * self.slot_size

    def is_possible(self) -> bool:
        """Return whether a segment can have these values."""
        return (
            self.slot_size >= BLOCK
            and self.slot_size % BLOCK == 0
            and self.slots >= 1
            and self.size <= MAX_SIZE
        )


def segment_name(number: int) -> str:
    """Return the file name of a segment."""
    return f"{number:08d}.seg"


def unfinished_name(number: int) -> str:
    """Return the file name of a segment that is still being created."""
    return segment_name(number) + UNFINISHED_SUFFIX


def lock_segment(fd: int, deadline: float) -> None:
    """Wait until no I/O of an earlier agent is in flight on the file, then lock the file.

    Requests in flight keep the file open, and thus locked, even after the agent's process has
    ended. One of their writes could overwrite a page stored later. Raises `OSError` (EBUSY) if
    requests are in flight at the deadline (`time.monotonic()`).
    """
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise OSError(errno.EBUSY, "I/O of an ended agent is still in flight") from None
            time.sleep(_LOCK_PAUSE)
        else:
            return


def create_segment(
    folder: Folder, number: int, slot_size: int, slots: int, *, direct: bool
) -> Segment:
    """Create and preallocate a segment file. If it raises `OSError`, no file is left behind.

    Syncs the header, because the file would be useless without it after a power failure.
    """
    name, unfinished = segment_name(number), unfinished_name(number)
    fd = folder.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _direct_flag(direct))
    segment = Segment(folder.path / name, fd, number, slot_size, slots, direct=direct)
    try:
        lock_segment(fd, time.monotonic())
        os.posix_fallocate(fd, 0, segment.size)
        direct_io.write_fully(fd, [pack_header(Header(number, slot_size, slots))], 0)
        os.fsync(fd)
        folder.rename(unfinished, name)
        folder.sync()
    except OSError:
        segment.close()
        with suppress(OSError):
            folder.remove(unfinished)
        raise
    return segment


def open_segment(
    folder: Folder, name: str, *, largest: int, direct: bool, deadline: float = 0.0
) -> Segment:
    """Open and lock a segment file. Raises `OSError` and `DamagedSegmentError`.

    A truncated file is extended to its full size, if that is at most `largest`. On a full disk,
    later writes extend it. `intact_slots` is the number of slots that the file still had. Bytes
    after the last slot are cut off. Waits for the lock until the deadline, see `lock_segment`.
    """
    fd = folder.open(name, os.O_RDWR | os.O_NONBLOCK | _direct_flag(direct))
    try:
        size = _file_size(fd)
        os.set_blocking(fd, True)
        lock_segment(fd, deadline)
        header = _read_header(fd, name, max(size, largest))
        segment = Segment(folder.path / name, fd, *header, direct=direct)
        if size < segment.size:
            segment.intact_slots = (size - HEADER_SIZE) // header.slot_size
            with suppress(OSError):
                os.posix_fallocate(fd, 0, segment.size)
        elif size > segment.size:
            with suppress(OSError):
                os.ftruncate(fd, segment.size)
    except BaseException:
        os.close(fd)
        raise
    return segment


def pack_header(header: Header) -> memoryview:
    """Return the header's block."""
    block = aligned_memory(HEADER_SIZE)
    fields = _FIELDS.pack(_MAGIC, FORMAT_VERSION, *header)
    block[: len(fields)] = fields
    block[len(fields) : len(fields) + _SEAL_SIZE] = xxhash.xxh3_128_digest(fields)
    return block


def _file_size(fd: int) -> int:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedSegmentError("is not a regular file")
    return status.st_size


def _read_header(fd: int, name: str, largest: int) -> Header:
    block = aligned_memory(HEADER_SIZE)
    try:
        direct_io.read_fully(fd, [block], 0)
    except EOFError:
        raise LostHeaderError("is shorter than its header") from None
    fields = bytes(block[: _FIELDS.size])
    magic, version, *values = _FIELDS.unpack(fields)
    if magic != _MAGIC:
        raise LostHeaderError("has no segment header")
    if xxhash.xxh3_128_digest(fields) != block[_FIELDS.size : _FIELDS.size + _SEAL_SIZE]:
        raise LostHeaderError("has a damaged header")
    if version != FORMAT_VERSION:
        raise DamagedSegmentError(f"has a header of version {version}")
    header = Header(*values)
    if not header.is_possible() or header.size > largest:
        raise LostHeaderError("has an impossible header")
    if name != segment_name(header.number):
        raise DamagedSegmentError(f"is segment {header.number} according to its header")
    return header


def _direct_flag(direct: bool) -> int:
    return os.O_DIRECT if direct else 0
