"""The fast path decrypts pages in place, and delivers none that was altered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_sglang.encryption.sealing import CONTEXT, NONCE_SIZE, OVERHEAD, seal
from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.minio.forms import KEY_ID
from memkv_sglang.tiers.minio.http import Sealing
from memkv_sglang.tiers.minio.names import page_fields
from tests.tiers.minio.fast_path import receive

LENGTHS = (1000, 1, 4097)
SIZE = sum(LENGTHS)
KEY, OTHER = make_chain(make_namespace(page_bytes=SIZE), 2).keys()
PAGE = make_page(KEY, LENGTHS, filled=True)
MASTERS = {name: bytes([number]) * 32 for number, name in enumerate(("old", "new"))}
SEALING = Sealing(
    {f"\r\n{KEY_ID}: {name}\r\n".encode(): key for name, key in MASTERS.items()}, CONTEXT
)


def response(sealed: bytearray, key_id: str = "new") -> bytes:
    """Return a response with this object, whose metadata agree with its bytes."""
    fields = {**page_fields(Page(KEY, (memoryview(sealed),))), KEY_ID: key_id, "etag": '"x"'}
    head = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    return f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + sealed


def sealed_page(key_id: str = "new") -> bytearray:
    sealed = bytearray(SIZE + OVERHEAD)
    seal(MASTERS[key_id], PAGE, memoryview(sealed))
    return sealed


@pytest.mark.parametrize("key_id", MASTERS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_pages_are_decrypted_in_place(key_id: str, piece: int) -> None:
    target = make_page(KEY, LENGTHS, filled=False)
    batch = receive(response(sealed_page(key_id), key_id), target, SEALING, piece)
    assert batch.checksums() == [page_checksum(KEY, PAGE.buffers)]
    assert b"".join(target.buffers) == b"".join(PAGE.buffers)


@given(st.integers(0, SIZE + OVERHEAD - 1), st.integers(1, 255), st.integers(500, 3000))
@settings(max_examples=60)
def test_altered_pages_are_not_delivered(at: int, change: int, piece: int) -> None:
    """The tampering is noticed even if the metadata match the altered bytes."""
    sealed = sealed_page()
    sealed[at] ^= change
    target = make_page(KEY, LENGTHS, filled=False)
    assert receive(response(sealed), target, SEALING, piece).checksums() == [None]


def test_pages_under_another_name_are_not_delivered() -> None:
    sealed = bytearray(SIZE + OVERHEAD)
    seal(MASTERS["new"], Page(OTHER, PAGE.buffers), memoryview(sealed))
    target = make_page(KEY, LENGTHS, filled=False)
    assert receive(response(sealed), target, SEALING).checksums() == [None]


@pytest.mark.parametrize("key_id", ["old", "unknown"])
def test_pages_of_another_key_are_not_delivered(key_id: str) -> None:
    target = make_page(KEY, LENGTHS, filled=False)
    batch = receive(response(sealed_page(), key_id), target, SEALING)
    assert batch.checksums() == [None]
    assert batch.unverified() == []


def test_plain_pages_are_not_delivered_as_encrypted_ones() -> None:
    content = bytearray(b"".join(PAGE.buffers)) + bytearray(OVERHEAD)
    head = response(content).replace(f"{KEY_ID}: new\r\n".encode(), b"")
    target = make_page(KEY, LENGTHS, filled=False)
    assert receive(head, target, SEALING).checksums() == [None]
    assert NONCE_SIZE == 12, "the loop receives the nonce apart"


def test_keys_are_not_shown() -> None:
    shown = f"{SEALING} {SEALING!r}"
    assert not any(repr(key) in shown for key in (*SEALING.keys.values(), SEALING.write) if key)
    assert shown == "Sealing(...) Sealing(...)"
