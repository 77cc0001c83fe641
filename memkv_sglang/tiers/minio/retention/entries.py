"""The entries of logs and of the index: what they say about a page, in 64 bytes. Uses numpy arrays.

A log holds the entries of one node, sorted by the first byte of the page hash, so that the entries
of a shard are one slice of it. A part of the index holds entries of one shard, sorted by key.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, PageKey

KEY_SIZE = NAMESPACE_DIGEST_SIZE + PAGE_HASH_SIZE

ENTRY = np.dtype(
    [
        ("key", f"S{KEY_SIZE}"),  # namespace and page hash
        ("size", "<u4"),  # bytes; 0 if unknown; or REMOVED
        ("used", "<u4"),  # time of the last use, or of the removal
        ("written", "<u4"),  # when the object was written; 0 if unknown
        ("position", "<u4"),  # place in the chain, from 0; or UNKNOWN
    ]
)
"""The type of an entry, which describes one page. Times are Unix times by the server's clock."""

Entries = npt.NDArray[np.void]
"""A one-dimensional array of `ENTRY`."""

REMOVED = 0xFFFFFFFF
"""Size in a log's entry of a page that was removed on purpose, at the time `used`."""

UNKNOWN = 0xFFFFFFFF
"""Position of a page whose place in its chain is unknown."""

SLICES = 256
"""Number of slices of a log: one for each first byte of the page hash."""

COUNT_LIMIT = 1 << 18
"""Maximum number of entries in an object, which then has 16 MiB."""

_MAGIC = b"MKVE"
_VERSION = 1
_HEADER = struct.Struct("<4sBxxxI8s")
_TABLE = np.dtype([("end", "<u4"), ("checksum", "<u8")])
HEADER_SIZE = _HEADER.size + SLICES * _TABLE.itemsize
"""Bytes of the head of a log."""

SIZE_LIMIT = HEADER_SIZE + COUNT_LIMIT * ENTRY.itemsize
"""Maximum bytes of a log or a part."""


class DamagedError(ValueError):
    """The bytes are not entries of this version, or were altered."""


def empty() -> Entries:
    """Return an array without entries."""
    return np.empty(0, ENTRY)


def entries(rows: Iterable[tuple[bytes, int, int, int, int]]) -> Entries:
    """Return an array of entries, given (key, size, used, written, position) of each."""
    return np.array(list(rows), ENTRY)


def key_bytes(found: Entries) -> list[bytes]:
    """Return the keys, `KEY_SIZE` bytes each."""
    # Items of a string array lose trailing zeros, so this slices the memory instead.
    raw = np.ascontiguousarray(found["key"]).tobytes()
    return [raw[i : i + KEY_SIZE] for i in range(0, len(raw), KEY_SIZE)]


def page_keys(found: Entries) -> list[PageKey]:
    """Return the keys of the pages."""
    size = NAMESPACE_DIGEST_SIZE
    return [PageKey(key[:size], key[size:]) for key in key_bytes(found)]


def page_hashes(found: Entries) -> npt.NDArray[Any]:
    """Return the hashes of the pages, as strings of fixed length."""
    raw = np.ascontiguousarray(found["key"]).view(np.uint8).reshape(-1, KEY_SIZE)
    hashes = np.ascontiguousarray(raw[:, NAMESPACE_DIGEST_SIZE:])
    return hashes.view(f"S{PAGE_HASH_SIZE}").reshape(-1)


def stored_sizes(found: Entries) -> npt.NDArray[np.uint32]:
    """Return the sizes of the pages that a log says were stored."""
    sizes: npt.NDArray[np.uint32] = found["size"][
        (found["written"] > 0) & (found["size"] != REMOVED)
    ]
    return sizes


def first_bytes(found: Entries) -> npt.NDArray[np.uint8]:
    """Return the first byte of each page's hash, which determines its shard."""
    raw = np.ascontiguousarray(found["key"]).view(np.uint8)
    return raw.reshape(-1, KEY_SIZE)[:, NAMESPACE_DIGEST_SIZE]


def encode(found: Entries) -> bytes:
    """Encode a log, or a part of the index, of at most `COUNT_LIMIT` entries."""
    assert len(found) <= COUNT_LIMIT
    buckets = first_bytes(found)
    if len(found) and np.any(buckets[1:] < buckets[:-1]):
        order = np.argsort(buckets, kind="stable")
        found, buckets = found[order], buckets[order]
    table = np.zeros(SLICES, _TABLE)
    table["end"] = np.searchsorted(buckets, np.arange(SLICES), side="right")
    body, begin = found.tobytes(), 0
    for i, end in enumerate(table["end"].tolist()):
        table[i]["checksum"] = _checksum(body[begin * ENTRY.itemsize : end * ENTRY.itemsize])
        begin = end
    head = table.tobytes()
    return _HEADER.pack(_MAGIC, _VERSION, len(found), _digest(head)) + head + body


class Head(NamedTuple):
    """The table at the start of a log."""

    ends: Sequence[int]
    checksums: Sequence[int]

    @classmethod
    def parse(cls, content: bytes) -> "Head":
        """Parse the first `HEADER_SIZE` bytes of a log. Raises `DamagedError`."""
        if len(content) < HEADER_SIZE:
            raise DamagedError(f"{len(content)} bytes, fewer than a head has")
        magic, version, count, digest = _HEADER.unpack_from(content)
        table = content[_HEADER.size : HEADER_SIZE]
        if magic != _MAGIC or version != _VERSION:
            raise DamagedError("not entries, or of another version")
        if count > COUNT_LIMIT or digest != _digest(table):
            raise DamagedError("the table is damaged")
        rows = np.frombuffer(table, _TABLE)
        ends = rows["end"].tolist()
        if ends[-1] != count or any(a > b for a, b in pairwise(ends)):
            raise DamagedError("the table contradicts itself")
        return cls(ends, rows["checksum"].tolist())

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return the byte range of the slices [first, last) within the object."""
        begin = self.ends[first - 1] if first else 0
        return tuple(HEADER_SIZE + i * ENTRY.itemsize for i in (begin, self.ends[last - 1]))  # type: ignore[return-value]

    def decode(self, first: int, last: int, content: bytes) -> Entries:
        """Return the entries of the slices [first, last), given their bytes.

        Raises `DamagedError`.
        """
        begin, end = self.span(first, last)
        if len(content) != end - begin:
            raise DamagedError(f"{len(content)} bytes, not {end - begin}")
        for i in range(first, last):
            a, b = (place - begin for place in self.span(i, i + 1))
            if _checksum(content[a:b]) != self.checksums[i]:
                raise DamagedError("an entry is damaged")
        found = np.frombuffer(content, ENTRY)
        buckets = first_bytes(found)
        if len(found) and (buckets[0] < first or buckets[-1] >= last):
            raise DamagedError("an entry is in the wrong slice")
        if np.any(buckets[1:] < buckets[:-1]):
            raise DamagedError("the entries are not sorted")
        return found


def decode(content: bytes) -> Entries:
    """Return the entries of a whole object. Raises `DamagedError`."""
    return Head.parse(content).decode(0, SLICES, content[HEADER_SIZE:])


def merge(*sources: Entries) -> Entries:
    """Merge all sources: return one entry for each remaining page, sorted by key.

    A page keeps its last use, the time of its last write, its largest size and its position. A
    removal cancels everything up to its time. If only uses of a page are known, its size is 0.
    """
    found = np.concatenate(sources) if sources else empty()
    if not len(found):
        return empty()
    found = found[np.argsort(found["key"], kind="stable")]
    starts = np.flatnonzero(np.concatenate(([True], found["key"][1:] != found["key"][:-1])))
    counts = np.diff(np.append(starts, len(found)))
    is_removal = found["size"] == REMOVED
    if is_removal.any():
        removed = np.maximum.reduceat(np.where(is_removal, found["used"], 0), starts)
        valid = ~is_removal & (found["used"] > np.repeat(removed, counts))
        return merge(found[valid]) if valid.any() else empty()
    merged = found[starts].copy()
    for field in ("size", "used", "written"):
        merged[field] = np.maximum.reduceat(found[field], starts)
    merged["position"] = np.minimum.reduceat(found["position"], starts)
    return merged


def by_key(found: Entries) -> Entries:
    """Return the entries sorted by key."""
    ordered: Entries = found[np.argsort(found["key"], kind="stable")]
    return ordered


def chosen(found: Entries, mask: npt.NDArray[np.bool_]) -> Entries:
    """Return the entries that a mask selects."""
    selected: Entries = found[mask]
    return selected


def split(found: Entries, size: int) -> Iterator[Entries]:
    """Yield consecutive arrays of at most `size` entries."""
    for first in range(0, len(found), size):
        yield found[first : first + size]


def _checksum(content: bytes) -> int:
    return xxhash.xxh3_64_intdigest(content)


def _digest(content: bytes) -> bytes:
    return xxhash.xxh3_64_digest(content)


def contained(found: Entries, sorted_keys: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return for each entry whether an array of sorted keys contains its key."""
    if not len(sorted_keys):
        return np.zeros(len(found), np.bool_)
    places = np.searchsorted(sorted_keys, found["key"])
    places[places == len(sorted_keys)] = 0
    matches: npt.NDArray[np.bool_] = sorted_keys[places] == found["key"]
    return matches
