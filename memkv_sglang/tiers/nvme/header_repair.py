"""Restore the lost header of a segment file from the footers in it."""

import enum
import errno
import os
from typing import BinaryIO

from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.footer import MAGIC, Footer, slot_size_of
from memkv_sglang.tiers.nvme.segment import HEADER_SIZE, Header, pack_header

_CHUNK = 1 << 20
_SEARCH_LIMIT = 256 << 20
"""Maximum bytes of data to search. Usually the first slot has a footer."""


class RepairResult(enum.Enum):
    """The outcome of a repair."""

    RESTORED = enum.auto()
    """The header was restored."""
    EMPTY = enum.auto()
    """The file contains only zeros: no page was ever written to it."""
    UNKNOWN = enum.auto()
    """The file may not be a segment and was left unchanged."""


def repair_header(folder: Folder, name: str) -> RepairResult:
    """Restore the header of a file that is named like a segment. Raises `OSError`.

    Changes the file only if it has a valid footer at an offset where a segment would have one.
    """
    number = int(name.removesuffix(".seg"))
    with os.fdopen(folder.open(name, os.O_RDWR), "r+b", buffering=0) as file:
        slot_size, is_empty = _search(file)
        if slot_size is None:
            return RepairResult.EMPTY if is_empty else RepairResult.UNKNOWN
        slots = (os.fstat(file.fileno()).st_size - HEADER_SIZE) // slot_size
        header = Header(number, slot_size, slots)
        if not header.is_possible():
            return RepairResult.UNKNOWN
        os.pwrite(file.fileno(), pack_header(header), 0)
        os.fsync(file.fileno())
    return RepairResult.RESTORED


def _search(file: BinaryIO) -> tuple[int | None, bool]:
    """Return the slot size that the first footer implies, and whether the file has only zeros."""
    searched = 0
    is_empty = True
    position = _next_data(file.fileno(), 0)
    while position is not None:
        if searched >= _SEARCH_LIMIT:
            return None, False
        chunk = os.pread(file.fileno(), _CHUNK, position)
        if not chunk:
            break
        if (slot_size := _slot_size_in(chunk, position)) is not None:
            return slot_size, False
        is_empty = is_empty and chunk.count(0) == len(chunk)
        searched += len(chunk)
        position = _next_data(file.fileno(), position + len(chunk))
    return None, is_empty


def _next_data(descriptor: int, position: int) -> int | None:
    """Return the offset of the next block with data, skipping holes; None at the file's end."""
    try:
        found = os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no more data
            return None
        raise
    return max(found // BLOCK * BLOCK, position)


def _slot_size_in(chunk: bytes, start: int) -> int | None:
    """Return the slot size that the first valid footer in data from offset `start` implies."""
    at = chunk.find(MAGIC)
    while at >= 0:
        block = memoryview(chunk)[at : at + BLOCK]
        if (start + at) % BLOCK == 0 and len(block) == BLOCK:
            footer = Footer.unpack(block)
            end = start + at + BLOCK - HEADER_SIZE
            if footer is not None and end % (size := slot_size_of(footer.length)) == 0:
                return size
        at = chunk.find(MAGIC, at + 1)
    return None
