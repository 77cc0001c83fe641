"""Segment files: preallocated, one block of header, then slots of one size.

Header, little-endian, one block: magic (8), format version (4), segment number (4), slot size (8),
slots (8), XXH3-128 of all before it (16), zeros.
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
"""Bytes; `nvme.segment_size` is at most that."""
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
        """Take over an open file; `direct` if it was opened with O_DIRECT."""
        self.path = path
        self.fd = fd
        self.number = number
        self.slot_size = slot_size
        self.slots = SlotMap(slots)
        self.direct = direct
        self.retiring = False
        """Whether it is about to be removed: no page comes to lie in it any more."""
        self.intact_slots = slots
        """Slots that lay within the file when it was opened; more are lost to truncation."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + len(self.slots) * self.slot_size

    @property
    def taken_bytes(self) -> int:
        """Bytes of the slots that are taken."""
        return (len(self.slots) - self.slots.free) * self.slot_size

    def offset(self, slot: int) -> int:
        """Return where in the file a slot begins."""
        return HEADER_SIZE + slot * self.slot_size

    def takes(self, buffers: Sequence[memoryview]) -> bool:
        """Tell whether the file reads and writes these buffers without a bounce."""
        return not self.direct or is_aligned(buffers)

    def read(self, vectors: Sequence[memoryview], slot: int) -> DiskRequest:
        """Ask for the vectors to be filled from a slot's begin on."""
        return DiskRequest(self.fd, vectors, self.offset(slot), writes=False)

    def read_footer(self, block: memoryview, slot: int) -> DiskRequest:
        """Ask for a block to be filled with what a slot ends with."""
        return DiskRequest(self.fd, [block], self.offset(slot + 1) - len(block), writes=False)

    def write(self, vectors: Sequence[memoryview], slot: int) -> DiskRequest:
        """Ask for the vectors to be written from a slot's begin on."""
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
    """The header is damaged, so that what the rest is cannot be told from it."""


class Header(NamedTuple):
    """What a segment file begins with."""

    number: int
    slot_size: int
    slots: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + self.slots * self.slot_size

    def is_possible(self) -> bool:
        """Tell whether a segment can be like this."""
        return (
            self.slot_size >= BLOCK
            and self.slot_size % BLOCK == 0
            and self.slots >= 1
            and self.size <= MAX_SIZE
        )


def segment_name(number: int) -> str:
    """Return the name of a segment file by its number."""
    return f"{number:08d}.seg"


def unfinished_name(number: int) -> str:
    """Return the name of a segment file that is still being made."""
    return segment_name(number) + UNFINISHED_SUFFIX


def lock_segment(fd: int, deadline: float) -> None:
    """Wait until no request of an earlier agent is on the file, and lock it for this one.

    An agent's requests in flight hold the open file, and with it its lock, even after the process
    has ended. A write among them would land on top of a page that is stored there later. Raises
    `OSError` (EBUSY) if some are left at the deadline (`time.monotonic()`).
    """
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise OSError(errno.EBUSY, "requests of an ended agent are still on it") from None
            time.sleep(_LOCK_PAUSE)
        else:
            return


def create_segment(
    folder: Folder, number: int, slot_size: int, slots: int, *, direct: bool
) -> Segment:
    """Make and preallocate a segment file. Raises `OSError`; then no file is left.

    Its header survives a power failure: without it the file would be lost space.
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
    """Open a segment file as it is, see `lock_segment`. Raises `OSError`, `DamagedSegmentError`.

    A file that is too short is made long enough again, or by later writes where the disk is full;
    `intact_slots` tells what it had. No file is made longer than `largest`. What is behind the last
    slot is cut off.
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
        raise DamagedSegmentError(f"is segment {header.number} by its header")
    return header


def _direct_flag(direct: bool) -> int:
    return os.O_DIRECT if direct else 0
