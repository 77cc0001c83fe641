"""The footer: a block after each page on disk that identifies the page in the slot.

Format, little-endian, one block: magic (8), format version (4), zero (4), content length (8),
sequence (8), namespace digest (16), page hash (32), page checksum (16), XXH3-128 of the preceding
bytes (16), zeros to the end of the block.
"""

import struct
from typing import NamedTuple

import xxhash

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.disk.direct_io import BLOCK, pad_to_block

FOOTER_SIZE = BLOCK
FORMAT_VERSION = 1
MAX_LENGTH = 1 << 36
"""Maximum bytes of a page: no segment is larger."""
MAX_TICK = 1 << 62
"""Maximum sequence number. Sequence numbers count pages from 0, so a higher one is invalid."""
MAGIC = b"MKVPAGE\0"
_FIELDS = struct.Struct("<8sI4xQQ16s32s16s")
_SEAL_SIZE = 16
_END = _FIELDS.size + _SEAL_SIZE


class Footer(NamedTuple):
    """Identifies the content of a slot."""

    key: PageKey
    length: int
    """Bytes of content, without padding."""
    sequence: int
    """Order of writing. Of two footers with the same key, the one with the higher number is newer.
    """
    checksum: bytes
    """The `page_checksum` of key and content."""

    def pack_into(self, block: memoryview) -> None:
        """Write the footer to a block."""
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
        """Parse a footer; return None if the block is not a valid footer."""
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
    """Return the bytes on disk for a page of this content length, including the footer."""
    return pad_to_block(length) + FOOTER_SIZE
