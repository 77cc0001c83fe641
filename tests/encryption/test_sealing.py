"""A sealed page opens only with its master key and under its own page key."""

import hashlib
import hmac
import secrets

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.encryption.sealing import CONTEXT, OVERHEAD, ForgedError, seal, unseal
from memkv_sglang.page import CHECKSUM_SIZE, ChangedPageError, PageKey, page_checksum
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page

MASTER = secrets.token_bytes(32)
CHAIN = make_chain(make_namespace(), 2).keys()
LENGTHS = (4096, 1, 33, 8192)


def sealed(lengths: tuple[int, ...] = LENGTHS) -> memoryview:
    page = make_page(CHAIN[0], lengths, filled=True)
    content = memoryview(bytearray(page.length + OVERHEAD))
    seal(MASTER, page, content)
    return content


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=6).map(tuple))
def test_unsealing_restores_pages_with_any_buffers(lengths: tuple[int, ...]) -> None:
    page = make_page(CHAIN[0], lengths[::-1], filled=False)
    checksum = unseal(MASTER, sealed(lengths), page)
    assert holds_content(page)
    assert checksum == page_checksum(page.key, page.buffers)


def test_changed_page_is_not_sealed() -> None:
    page = make_page(CHAIN[0], LENGTHS, filled=True)._replace(checksum=bytes(CHECKSUM_SIZE))
    with pytest.raises(ChangedPageError):
        seal(MASTER, page, memoryview(bytearray(page.length + OVERHEAD)))


def test_format_matches_its_documentation() -> None:
    """Unseal it independently: HKDF-Expand by hand, GCM with the one-shot function."""
    content = sealed()
    context = CONTEXT + CHAIN[0].namespace + CHAIN[0].hash
    key = hmac.digest(MASTER, context + b"\x01", hashlib.sha256)
    plain = AESGCM(key).decrypt(bytes(content[:12]), bytes(content[12:]), context)
    page = make_page(CHAIN[0], LENGTHS, filled=True)
    assert plain == b"".join(page.buffers) + page_checksum(page.key, page.buffers)


def test_sealing_twice_gives_different_bytes() -> None:
    first, second = bytes(sealed()), bytes(sealed())
    assert first[:12] != second[:12]
    assert all(first[i : i + 16] != second[i : i + 16] for i in range(12, len(first) - 16))


@pytest.mark.parametrize(
    "key", [CHAIN[1], PageKey(make_namespace(model="another").digest, CHAIN[0].hash)]
)
def test_sealed_page_does_not_open_as_another_page(key: PageKey) -> None:
    with pytest.raises(ForgedError):
        unseal(MASTER, sealed(), make_page(key, LENGTHS, filled=False))


def test_another_master_key_does_not_open_the_page() -> None:
    with pytest.raises(ForgedError):
        unseal(secrets.token_bytes(32), sealed(), make_page(CHAIN[0], LENGTHS, filled=False))


@given(st.integers(0, sum(LENGTHS) + OVERHEAD - 1), st.integers(0, 7))
def test_flipped_bit_is_detected(place: int, bit: int) -> None:
    content = sealed()
    content[place] ^= 1 << bit
    with pytest.raises(ForgedError):
        unseal(MASTER, content, make_page(CHAIN[0], LENGTHS, filled=False))
