"""Test pages whose content is derived from their key, so that any wrong byte is detected."""

import hashlib
import random
from collections.abc import Sequence

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey

BLOCK = 4096


def make_namespace(page_bytes: int = 8 * BLOCK, **fields: object) -> Namespace:
    """Return a namespace for tests; `fields` override its fields."""
    values: dict[str, object] = {
        "model": "test-model",
        "kv_dtype": "float32",
        "layout": "page_first",
        "page_size": 64,
        "page_bytes": page_bytes,
        "layers": (0, 2),
        **fields,
    }
    return Namespace(**values)  # type: ignore[arg-type]  # msgspec checks the types on parsing


def make_hashes(count: int, seed: str = "", parent: bytes = b"") -> list[bytes]:
    """Return the hashes of `count` consecutive pages after `parent`. Deterministic."""
    hashes: list[bytes] = []
    for position in range(count):
        previous = hashes[-1] if hashes else parent
        hashes.append(hashlib.sha256(previous + f"{seed}/{position}".encode()).digest())
    return hashes


def make_chain(namespace: Namespace, count: int, seed: str = "") -> Chain:
    """Return a chain of `count` pages in `namespace`."""
    return Chain(namespace.digest, make_hashes(count, seed))


def page_content(key: PageKey, length: int) -> bytes:
    """Return the correct content of the page with this key."""
    return random.Random(key.namespace + key.hash).randbytes(length)  # noqa: S311 - not a secret


def make_page(key: PageKey, lengths: Sequence[int], *, filled: bool) -> Page:
    """Return a page in new buffers, filled with its content or with bytes that are all wrong."""
    content = page_content(key, sum(lengths))
    if not filled:
        content = bytes(byte ^ 0xFF for byte in content)
    buffers, offset = [], 0
    for length in lengths:
        buffers.append(memoryview(bytearray(content[offset : offset + length])))
        offset += length
    return Page(key, tuple(buffers))


def holds_content(page: Page) -> bool:
    """Return whether the buffers hold the page's correct content."""
    return b"".join(page.buffers) == page_content(page.key, page.length)
