"""SGLang's page hashes of token ids, for who names a prompt's pages without a server's memory.

The format is that of SGLang 0.5.23, `mem_cache/cpp_utils/hash_binding.cpp` and, for the seed,
`mem_cache/utils.py: storage_namespace_seed`; a test compares both.
"""

import hashlib
import struct
from collections.abc import Sequence

UINT32_MAX = 2**32 - 1


def page_hashes(tokens: Sequence[int], page_size: int, seed: bytes = b"") -> list[bytes]:
    """Return the hash of every whole page of the tokens, from the first on.

    Each covers the one before (at first `seed`) and the page's tokens as little-endian 32-bit
    integers; if one needs more, a byte 0xff and all of them in 64 bits. Raises `ValueError` for a
    token that is negative or larger than that.
    """
    hashes, before = [], seed
    for first in range(0, len(tokens) - page_size + 1, page_size):
        before = hashlib.sha256(before + _encode(tokens[first : first + page_size])).digest()
        hashes.append(before)
    return hashes


def chain_seed(extra_key: str | None, salt: str | None) -> bytes:
    """Return what seeds the chain of a request with an `extra_key` (LoRA) or a cache salt."""
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
        raise ValueError(f"no token ids: {error}") from None
