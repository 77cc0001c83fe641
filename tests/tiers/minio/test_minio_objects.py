"""The fast match accepts only responses that the full check accepts."""

import pytest

from memkv_sglang.page import page_checksum
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.minio.names import CHECKSUM, FORMAT, LENGTH, page_fields
from tests.tiers.minio.fast_path import receive

[KEY] = make_chain(make_namespace(page_bytes=4096), 1).keys()
PAGE = make_page(KEY, (1024, 3072), filled=True)
SUM = page_checksum(KEY, PAGE.buffers)


def fast_match(head: bytes, content: bytes = b"".join(PAGE.buffers)) -> bool:
    """Return whether the fast path verifies a page with this response head."""
    target = make_page(KEY, (1024, 3072), filled=False)
    checksums = receive(head + b"\r\n" + content, target, piece=700).checksums()
    assert checksums in ([None], [SUM])
    return checksums == [SUM]


def head(**changed: str) -> bytes:
    """Return the head of a response for the page with changed fields; empty ones are omitted."""
    fields = {"Server": "MinIO", **page_fields(PAGE)} | {
        {"format": FORMAT, "length": LENGTH, "checksum": CHECKSUM}[name]: value
        for name, value in changed.items()
    }
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value]
    return "".join(["HTTP/1.1 200 OK\r\n", *lines, "Date: now\r\n"]).encode()


@pytest.mark.parametrize(
    "response", [head(), head()[:12] + head()[12:].title(), head().replace(b"x-amz", b"X-Amz")]
)
def test_matching_response(response: bytes) -> None:
    assert fast_match(response)


@pytest.mark.parametrize(
    "response",
    [
        head(format="2"),
        head(format="11"),
        head(length="4095"),
        head(length="40960"),
        head(length=""),
        head(checksum=SUM.hex()[:-1]),
        head(checksum=SUM.hex() + "0"),
        head(checksum=bytes(16).hex()),
        head(checksum=""),
        head() + f"{FORMAT}: 1\r\n".encode(),
        head() + f"{CHECKSUM}: {bytes(16).hex()}\r\n".encode(),
        head() + b"x-amz-meta-memkv-key: named\r\n",
        head(format="") + b"x-amz-meta-memkv-key: named\r\n",
        b"",
    ],
)
def test_response_that_needs_the_full_check(response: bytes) -> None:
    assert not fast_match(response)


def test_corrupt_content_is_quarantined() -> None:
    assert not fast_match(head(), bytes(PAGE.length))
