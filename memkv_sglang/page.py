"""Pages: their keys, buffers and checksums."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

NAMESPACE_DIGEST_SIZE = 16
"""Bytes of a namespace digest (SHA-256, truncated)."""

PAGE_HASH_SIZE = 32
"""Bytes of a page hash (SGLang's chained SHA-256)."""

CHECKSUM_SIZE = 16
"""Bytes of a page checksum (XXH3-128)."""


class PageKey(NamedTuple):
    """Identifies a page. Two pages with the same key hold the same bytes."""

    namespace: bytes
    """The namespace's digest, `NAMESPACE_DIGEST_SIZE` bytes."""
    hash: bytes
    """Page hash, `PAGE_HASH_SIZE` bytes."""


class Chain(NamedTuple):
    """Hashes of consecutive pages of a token sequence, starting at any page of it."""

    namespace: bytes
    hashes: Sequence[bytes]

    def keys(self) -> list[PageKey]:
        """Return the key of every page, in order."""
        return [PageKey(self.namespace, page_hash) for page_hash in self.hashes]


class Buffer(NamedTuple):
    """Part of a page, as messages name it: bytes `[offset, offset + length)` of a pool."""

    pool: int
    offset: int
    length: int


class Page(NamedTuple):
    """A page and the memory for its content, which is stored as the concatenation of its buffers.

    A tier reads the buffers when it spills and writes to them when it loads. They must be
    C-contiguous byte views, and writable for a load. The caller owns them.
    """

    key: PageKey
    buffers: tuple[memoryview, ...]
    checksum: bytes | None = None
    """The checksum verified when the content was read; None if the page is new."""

    @property
    def length(self) -> int:
        """Bytes of content in all buffers."""
        return sum(map(len, self.buffers))


def gather(parts: Iterable[memoryview], whole: memoryview) -> None:
    """Copy several buffers, in order, into one."""
    for part in parts:
        whole[: len(part)] = part
        whole = whole[len(part) :]


def scatter(whole: memoryview, parts: Iterable[memoryview]) -> None:
    """Copy one buffer into several, in order."""
    for part in parts:
        part[:] = whole[: len(part)]
        whole = whole[len(part) :]


class ChangedPageError(Exception):
    """A page's content does not match the checksum that came with it."""


def page_checksum(key: PageKey, buffers: Iterable[memoryview]) -> bytes:
    """Return the XXH3-128 digest of a page's content, seeded with its key.

    Because of the seed, intact content stored under the wrong key fails verification, too.
    """
    hasher = xxhash.xxh3_128(seed=checksum_seed(key))
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.digest()


def spill_checksum(page: Page, content: Iterable[memoryview]) -> bytes:
    """Return the checksum to store with a page's `content`.

    Raises `ChangedPageError` if the page already has a checksum and the content does not match it.
    """
    checksum = page_checksum(page.key, content)
    if page.checksum not in (None, checksum):
        raise ChangedPageError(f"page {page.key.hash.hex()} changed after it was read")
    return checksum


def checksum_seed(key: PageKey) -> int:
    """Return the 64-bit seed of a page's checksum."""
    return int.from_bytes(key.namespace[:8], "little") ^ int.from_bytes(key.hash[:8], "little")
