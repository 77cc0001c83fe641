"""A network that alters responses: a miss at worst, and the object is not quarantined."""

from collections.abc import Callable
from io import BytesIO

import msgspec
import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier

KEY = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 1).keys()[0]


class Altering:
    """Flips a different bit in the content of each of the first `times` responses."""

    def __init__(self, times: int) -> None:
        self._left = times

    def __call__(self, content: bytes) -> bytes:
        self._left -= 1
        if self._left < 0:
            return content
        where = self._left % len(content)
        return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


@pytest.fixture
def tier(
    minio_config: MinioConfig, proxy: HttpFaultProxy, open_tier: Callable[[MinioConfig], MinioTier]
) -> MinioTier:
    tier = open_tier(msgspec.structs.replace(minio_config, endpoint=proxy.url))
    spill(tier, [KEY])
    return tier


def quarantined(admin: Minio, bucket: str) -> int:
    return sum(1 for _ in admin.list_objects(bucket, prefix="quarantine/", recursive=True))


def test_response_that_was_altered_once_is_read_again(
    tier: MinioTier, proxy: HttpFaultProxy, admin: Minio, minio_config: MinioConfig
) -> None:
    proxy.fault = HttpFault(methods=("GET",), edit_content=Altering(1))
    load(tier, [KEY])
    assert tier.telemetry.counts()["response_altered"] == 1
    assert quarantined(admin, minio_config.bucket) == 0


def test_object_is_not_quarantined_while_each_response_differs(
    tier: MinioTier, proxy: HttpFaultProxy, admin: Minio, minio_config: MinioConfig
) -> None:
    proxy.fault = HttpFault(methods=("GET",), edit_content=Altering(1000))
    page = make_page(KEY, LENGTHS, filled=False)
    assert tier.load([page], soon()) == [LoadResult.FAILED]
    assert not holds_content(page)
    assert tier.telemetry.counts()["response_altered"] == 1
    assert "corrupt" not in tier.telemetry.counts()
    proxy.fault = NO_FAULT
    load(tier, [KEY])
    assert quarantined(admin, minio_config.bucket) == 0


def test_object_that_was_rewritten_meanwhile_is_not_quarantined(
    tier: MinioTier, proxy: HttpFaultProxy, admin: Minio, minio_config: MinioConfig
) -> None:
    """Another node quarantined the corrupt object and stored the page again."""
    [entry] = admin.list_objects(minio_config.bucket, prefix=KEY.namespace.hex(), recursive=True)
    assert entry.object_name
    good = admin.get_object(minio_config.bucket, entry.object_name)
    fields: dict[str, str | list[str] | tuple[str]] = {
        k: v for k, v in good.headers.items() if k.startswith("x-amz-meta-")
    }
    content, bad = good.data, bytes(len(good.data))
    good.release_conn()

    def put(data: bytes) -> None:
        admin.put_object(
            minio_config.bucket, entry.object_name or "", BytesIO(data), len(data), metadata=fields
        )

    put(bad)
    answers = 0

    def store_anew(body: bytes) -> bytes:
        nonlocal answers
        answers += 1
        if answers == 2:
            put(content)
        return body

    proxy.fault = HttpFault(methods=("GET",), edit_content=store_anew)
    page = make_page(KEY, LENGTHS, filled=False)
    assert tier.load([page], soon()) != [LoadResult.LOADED]
    proxy.fault = NO_FAULT
    load(tier, [KEY])
    assert quarantined(admin, minio_config.bucket) == 0
