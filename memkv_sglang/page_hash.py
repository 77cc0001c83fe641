"""Compute SGLang's page hashes from token ids, without a running server.

The format is that of SGLang 0.5.23: `mem_cache/cpp_utils/hash_binding.cpp` and, for the seed,
`storage_namespace_seed` in `mem_cache/utils.py`. A test compares the hashes with SGLang's.
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence
from itertools import pairwise

UINT32_MAX = 2**32 - 1


def page_hashes(tokens: Sequence[int], page_size: int, seed: bytes = b"") -> list[bytes]:
    """Return the hash of every complete page of the tokens, in order.

    Each hash covers the previous one (`seed` for the first page) and the page's tokens as
    little-endian 32-bit integers. If a token does not fit, the page is encoded as the byte 0xff
    followed by 64-bit integers. Raises `ValueError` for a token that is negative or does
    not fit in 64 bits.
    """
    hashes, previous = [], seed
    for first in range(0, len(tokens) - page_size + 1, page_size):
        previous = hashlib.sha256(previous + _encode(tokens[first : first + page_size])).digest()
        hashes.append(previous)
    return hashes


def chain_seed(extra_key: str | None, salt: str | None) -> bytes:
    """Return the hash seed for a request with an `extra_key` (LoRA) or a cache salt."""
    if extra_key is None and salt is None:
        return b""
    digest = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, salt):
        encoded = part.encode() if part is not None else b""
        digest.update(b"\x00" if part is None else b"\x01" + struct.pack("<Q", len(encoded)))
        digest.update(encoded)
    return digest.digest()


class PythonPageHash:
    """A Python version of SGLang's compiled `hash_binding.cpp`, at a third of its speed."""

    def get_hash(
        self,
        raw_tokens: "array[int]",
        logical_len: int,
        unit_width: int,
        is_bigram: bool,
        prior_digest: bytes | None,
        page_size: int | None = None,
    ) -> str | list[str]:
        """Return the hash (hex) of each page; the last one may be shorter.

        Args:
            raw_tokens: token ids.
            logical_len: number of units to hash.
            unit_width: token ids per unit.
            is_bigram: whether a unit is a token id and the next one; `raw_tokens` has one more.
            prior_digest: the hash before the first page; None at the start.
            page_size: units per page; None for one hash of everything.

        Raises:
            ValueError: for a negative token.

        """
        tokens = list(raw_tokens)
        if is_bigram:
            tokens = [token for pair in pairwise(tokens[: logical_len + 1]) for token in pair]
        step = (page_size or max(logical_len, 1)) * unit_width
        end = logical_len * unit_width
        hashes, previous = [], prior_digest or b""
        for first in range(0, max(end, 0 if page_size else 1), step):
            page = tokens[first : min(first + step, end)]
            previous = hashlib.sha256(previous + _encode(page)).digest()
            hashes.append(previous.hex())
        return hashes if page_size else hashes[0]


def _encode(tokens: Sequence[int]) -> bytes:
    try:
        if tokens and max(tokens) > UINT32_MAX:
            return b"\xff" + struct.pack(f"<{len(tokens)}q", *tokens)
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"invalid token ids: {error}") from None
