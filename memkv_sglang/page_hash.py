"""Compute SGLang's page hashes from token ids, without a running server.

The format is that of SGLang 0.5.23: `mem_cache/cpp_utils/hash_binding.cpp` and, for the seed,
`mem_cache/utils.py: storage_namespace_seed`. A test compares both.
"""

import hashlib
import struct
from collections.abc import Sequence

UINT32_MAX = 2**32 - 1


def page_hashes(tokens: Sequence[int], page_size: int, seed: bytes = b"") -> list[bytes]:
    """Return the hash of every complete page of the tokens, in order.

    Each hash covers the previous one (`seed` for the first page) and the page's tokens as
    little-endian 32-bit integers. If a token does not fit, the page is encoded as the byte 0xff
    followed by 64-bit integers. Raises `ValueError` for a negative token or one that needs more.
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


def _encode(tokens: Sequence[int]) -> bytes:
    try:
        if max(tokens) > UINT32_MAX:
            return b"\xff" + struct.pack(f"<{len(tokens)}q", *tokens)
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise ValueError(f"invalid token ids: {error}") from None
