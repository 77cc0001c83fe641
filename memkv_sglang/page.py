"""What a page is: its key, where its bytes lie, and the checksum that binds the two together."""

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
    """What identifies a page: two pages with one key hold the same bytes."""

    namespace: bytes
    """Namespace digest, `NAMESPACE_DIGEST_SIZE` bytes."""
    hash: bytes
    """Page hash, `PAGE_HASH_SIZE` bytes."""


class Chain(NamedTuple):
    """The page hashes of a sequence, in order. Need not begin at the sequence's first page."""

    namespace: bytes
    hashes: Sequence[bytes]

    def keys(self) -> list[PageKey]:
        """Return the key of every page, in order."""
        return [PageKey(self.namespace, page_hash) for page_hash in self.hashes]


class Buffer(NamedTuple):
    """A piece of a page as messages name it: bytes `[offset, offset + length)` of a pool."""

    pool: int
    offset: int
    length: int


class Page(NamedTuple):
    """A page with the memory that holds it: the buffers follow one another in stored form.

    A tier reads from the buffers when it spills and writes into them when it loads. They must be
    C-contiguous byte views, and writable for a load.
    """

    key: PageKey
    buffers: tuple[memoryview, ...]
    checksum: bytes | None = None
    """The checksum that the content was verified against when it was read; None if it is new."""

    @property
    def length(self) -> int:
        """Bytes of content, over all buffers."""
        return sum(map(len, self.buffers))


def gather(parts: Iterable[memoryview], whole: memoryview) -> None:
    """Copy buffers one after the other into one."""
    for part in parts:
        whole[: len(part)] = part
        whole = whole[len(part) :]


def scatter(whole: memoryview, parts: Iterable[memoryview]) -> None:
    """Copy one buffer into several, in order."""
    for part in parts:
        part[:] = whole[: len(part)]
        whole = whole[len(part) :]


class ChangedPageError(Exception):
    """A page's content does not have the checksum that came with it."""


def page_checksum(key: PageKey, buffers: Iterable[memoryview]) -> bytes:
    """Return the XXH3-128 digest of a page's content, seeded with its key.

    The seed makes the checksum fail as well for intact content that is stored under another key.
    """
    hasher = xxhash.xxh3_128(seed=checksum_seed(key))
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.digest()


def spill_checksum(page: Page, content: Iterable[memoryview]) -> bytes:
    """Return the checksum to store with a page's `content`.

    Computes one only for a page that has none yet. Raises `ChangedPageError` if the content does
    not have the page's own.
    """
    checksum = page_checksum(page.key, content)
    if page.checksum not in (None, checksum):
        raise ChangedPageError(f"page {page.key.hash.hex()} changed after it was read")
    return checksum


def checksum_seed(key: PageKey) -> int:
    """Return the seed of a page's checksum, 64 bits."""
    return int.from_bytes(key.namespace[:8], "little") ^ int.from_bytes(key.hash[:8], "little")
