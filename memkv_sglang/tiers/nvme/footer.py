"""The block behind every page on disk that says which page it is: the truth about its slot.

Format, little-endian, one block: magic (8), format version (4), zero (4), content length (8),
sequence (8), namespace digest (16), page hash (32), page checksum (16), XXH3-128 of all before it
(16), zeros to the end of the block.
"""

import struct
from typing import NamedTuple

import xxhash

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK, pad_to_block

FOOTER_SIZE = BLOCK
FORMAT_VERSION = 1
MAX_LENGTH = 1 << 36
"""Bytes of a page: no segment is larger."""
MAX_TICK = 1 << 62
"""Sequence numbers begin at 0 and count pages; a higher one was not written by us."""
MAGIC = b"MKVPAGE\0"
_FIELDS = struct.Struct("<8sI4xQQ16s32s16s")
_SEAL_SIZE = 16
_END = _FIELDS.size + _SEAL_SIZE


class Footer(NamedTuple):
    """What a slot holds."""

    key: PageKey
    length: int
    """Bytes of content, before padding."""
    sequence: int
    """Of two footers with one key the higher is the newer. Older pages have lower ones."""
    checksum: bytes
    """`page_checksum` of key and content."""

    def pack_into(self, block: memoryview) -> None:
        """Write the footer over a block."""
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            self.length,
            self.sequence,
            self.key.namespace,
            self.key.hash,
            self.checksum,
        )
        block[:] = (fields + xxhash.xxh3_128_digest(fields)).ljust(BLOCK, b"\0")

    @classmethod
    def unpack(cls, block: memoryview) -> "Footer | None":
        """Read a footer; None for a block that is none, is damaged or has impossible values."""
        magic, version, length, sequence, namespace, page_hash, checksum = _FIELDS.unpack_from(
            block
        )
        if magic != MAGIC or version != FORMAT_VERSION:
            return None
        if xxhash.xxh3_128_digest(block[: _FIELDS.size]) != block[_FIELDS.size : _END]:
            return None
        if length > MAX_LENGTH or sequence > MAX_TICK:
            return None
        return cls(PageKey(namespace, page_hash), length, sequence, checksum)


def slot_size_of(length: int) -> int:
    """Return the bytes that a page of this content length takes on disk, footer included."""
    return pad_to_block(length) + FOOTER_SIZE
