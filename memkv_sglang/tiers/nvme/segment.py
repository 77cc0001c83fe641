"""Segment files: preallocated, one block of header, then slots of one size.

Header, little-endian, one block: magic (8), format version (4), segment number (4), slot size (8),
slots (8), XXH3-128 of all before it (16), zeros.
"""

import errno
import fcntl
import os
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
from memkv_sglang.tiers.nvme.slots import SlotMap

HEADER_SIZE = BLOCK
FORMAT_VERSION = 1
UNFINISHED_SUFFIX = ".new"
"""Ends the name of a segment file that is still being made."""
_MAGIC = b"MKVSEGM\0"
_FIELDS = struct.Struct("<8sIIQQ")
_SEAL_SIZE = 16
_LOCK_PAUSE = 0.01


class Segment:
    """An open segment file and the state of its slots."""

    __slots__ = ("direct", "fd", "intact_slots", "number", "path", "slot_size", "slots")

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
        self.intact_slots = slots
        """Slots that lay within the file when it was opened; more are lost to truncation."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_SIZE + len(self.slots) * self.slot_size

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


def segment_path(directory: Path, number: int) -> Path:
    """Return the path of a segment by its number."""
    return directory / f"{number:08d}.seg"


def unfinished_path(directory: Path, number: int) -> Path:
    """Return the path of a segment that is still being made."""
    path = segment_path(directory, number)
    return path.with_name(path.name + UNFINISHED_SUFFIX)


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
    directory: Path, number: int, slot_size: int, slots: int, *, direct: bool
) -> Segment:
    """Make and preallocate a segment file. Raises `OSError`; then no file is left."""
    path = segment_path(directory, number)
    unfinished = unfinished_path(directory, number)
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _direct_flag(direct), 0o600)
    segment = Segment(path, fd, number, slot_size, slots, direct=direct)
    try:
        lock_segment(fd, time.monotonic())
        os.posix_fallocate(fd, 0, segment.size)
        direct_io.write_fully(fd, [_pack_header(number, slot_size, slots)], 0)
        unfinished.rename(path)
    except OSError:
        segment.close()
        unfinished.unlink(missing_ok=True)
        raise
    return segment


def open_segment(path: Path, *, direct: bool, deadline: float = 0.0) -> Segment:
    """Open a segment file as it is, see `lock_segment`. Raises `OSError`, `DamagedSegmentError`.

    A file that is too short is made long enough again, or by later writes where the disk is full;
    `intact_slots` tells what it had.
    """
    fd = os.open(path, os.O_RDWR | _direct_flag(direct))
    try:
        lock_segment(fd, deadline)
        number, slot_size, slots = _read_header(fd, path)
        size = os.fstat(fd).st_size
        segment = Segment(path, fd, number, slot_size, slots, direct=direct)
        if size < segment.size:
            segment.intact_slots = (size - HEADER_SIZE) // slot_size
            with suppress(OSError):
                os.posix_fallocate(fd, 0, segment.size)
    except BaseException:
        os.close(fd)
        raise
    return segment


def _pack_header(number: int, slot_size: int, slots: int) -> memoryview:
    block = aligned_memory(HEADER_SIZE)
    fields = _FIELDS.pack(_MAGIC, FORMAT_VERSION, number, slot_size, slots)
    block[: len(fields)] = fields
    block[len(fields) : len(fields) + _SEAL_SIZE] = xxhash.xxh3_128_digest(fields)
    return block


def _read_header(fd: int, path: Path) -> tuple[int, int, int]:
    block = aligned_memory(HEADER_SIZE)
    try:
        direct_io.read_fully(fd, [block], 0)
    except EOFError:
        raise DamagedSegmentError("is shorter than its header") from None
    fields = bytes(block[: _FIELDS.size])
    magic, version, number, slot_size, slots = _FIELDS.unpack(fields)
    if magic != _MAGIC or version != FORMAT_VERSION:
        raise DamagedSegmentError("has no segment header of this version")
    if xxhash.xxh3_128_digest(fields) != block[_FIELDS.size : _FIELDS.size + _SEAL_SIZE]:
        raise DamagedSegmentError("has a damaged header")
    if path.name != segment_path(path.parent, number).name:
        raise DamagedSegmentError(f"is segment {number} by its header")
    return number, slot_size, slots


def _direct_flag(direct: bool) -> int:
    return os.O_DIRECT if direct else 0
