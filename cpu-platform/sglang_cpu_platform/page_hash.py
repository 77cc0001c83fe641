"""Compute SGLang's page hashes without a compiler.

SGLang 0.5.23 compiles `mem_cache/cpp_utils/hash_binding.cpp` at the first request (about 7 s; it
needs g++, ninja and the headers of OpenSSL) and has no fallback. `python -m
sglang_cpu_platform.prepare` compiles it in advance. If it cannot be compiled, `HashlibPageHash`
computes the same hashes at about a third of the speed.
"""

import hashlib
import logging
from array import array
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

_UINT32_MAX = 2**32 - 1
_INT64_MAX = 2**63 - 1
# Prefix of pages with a token of more than 32 bits. No other page has an odd length.
_WIDE = b"\xff"


class PageHash(Protocol):
    """The interface of the compiled extension and of `HashlibPageHash`."""

    def get_hash(
        self,
        raw_tokens: "array[int]",
        logical_len: int,
        unit_width: int,
        is_bigram: bool,
        prior_digest: bytes | None,
        page_size: int | None = None,
    ) -> str | list[str]:
        """Hash tokens as one page (`page_size` None), or as a chain of pages."""
        ...


class HashlibPageHash:
    """The extension's `get_hash`, in Python."""

    def get_hash(
        self,
        raw_tokens: "array[int]",
        logical_len: int,
        unit_width: int,
        is_bigram: bool,
        prior_digest: bytes | None,
        page_size: int | None = None,
    ) -> str | list[str]:
        """Return the SHA-256 of the tokens in hex, chained to the previous pages.

        A page's hash covers the previous digest and the tokens as little-endian 32-bit integers.
        If a token needs more, it covers a byte 0xff and all tokens as 64-bit integers. The last
        page may be shorter than `page_size`.

        Args:
            raw_tokens: the token ids, of 4 or 8 bytes each.
            logical_len: units to hash.
            unit_width: token ids per unit.
            is_bigram: a unit is a token id and the next one; `raw_tokens` has one more.
            prior_digest: the 32 bytes of the digest before the first page; None at the start.
            page_size: units per page; None for one hash of everything.

        Raises:
            ValueError: fewer tokens than `logical_len`, a prior digest that is not 32
                bytes, or a page size of 0.
            IndexError: a negative token id.

        """
        needed = logical_len + 1 if is_bigram and logical_len else logical_len * unit_width
        if raw_tokens.itemsize not in (4, 8):
            raise ValueError("raw_tokens itemsize must be 4 or 8 bytes")
        if len(raw_tokens) < needed:
            raise ValueError("raw_tokens is shorter than logical_len")
        if prior_digest is not None and len(prior_digest) != hashlib.sha256().digest_size:
            raise ValueError("prior_digest must be exactly 32 bytes")
        if page_size == 0:
            raise ValueError("page_size must be positive")
        if page_size is None:
            starts, units = range(1), logical_len
        else:
            starts, units = range(0, logical_len, page_size), page_size
        digest = prior_digest or b""
        hashes = []
        for start in starts:
            stop = min(start + units, logical_len)
            if is_bigram:
                tokens = _bigrams(raw_tokens[start : stop + 1])
            else:
                tokens = raw_tokens[start * unit_width : stop * unit_width]
            digest = hashlib.sha256(digest + _encode(tokens)).digest()
            hashes.append(digest.hex())
        return hashes[0] if page_size is None else hashes


def _bigrams(window: "array[int]") -> "array[int]":
    pairs = array(window.typecode, bytes(2 * max(len(window) - 1, 0) * window.itemsize))
    pairs[0::2], pairs[1::2] = window[:-1], window[1:]
    return pairs


def _encode(tokens: "array[int]") -> bytes:
    if tokens.itemsize == 4:
        return tokens.tobytes()
    if tokens and (min(tokens) < 0 or max(tokens) > _INT64_MAX):
        raise IndexError("token id must be a non-negative int64")
    if tokens and max(tokens) > _UINT32_MAX:
        return _WIDE + tokens.tobytes()
    return array("I", tokens).tobytes()


def load(original: Callable[[], PageHash]) -> PageHash:
    """Wrap `_load_native_hash_module`. Returns the extension, or else the fallback."""
    global _fallback
    if _fallback is None:
        try:
            return original()
        except RuntimeError as error:
            logger.warning(
                "page hashes use hashlib, which is slower: the extension cannot be built: %s",
                error.__cause__ or error,
            )
            _fallback = HashlibPageHash()
    return _fallback


_fallback: HashlibPageHash | None = None
