"""Back off from a server that asks for it (`Retry-After`), for a bounded time."""

import time

import msgspec
import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.conformance import LENGTHS, soon
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http import pool
from tests.tiers.minio.conftest import OpenTier

CHAIN = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 3)
STRANGER = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 1, "stranger")


def busy(status: str, seconds: int) -> HttpFault:
    head = f"HTTP/1.1 {status}\r\nRetry-After: {seconds}\r\nContent-Length: 0\r\n\r\n"
    return HttpFault(answer=head.encode())


@pytest.fixture
def tier(minio_config: MinioConfig, proxy: HttpFaultProxy, open_tier: OpenTier) -> MinioTier:
    tier = open_tier(msgspec.structs.replace(minio_config, endpoint=proxy.url, negative_ttl=0.0))
    pages = [make_page(key, LENGTHS, filled=True) for key in CHAIN.keys()]
    assert tier.spill(pages, soon()) == [SpillResult.STORED] * 3
    return tier


def load(tier: MinioTier) -> list[LoadResult]:
    pages = [make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()]
    results = tier.load(pages, soon())
    assert all(holds_content(p) for p, r in zip(pages, results, strict=True) if r == 0)
    return results


@pytest.mark.parametrize("status", ["503 Service Unavailable", "429 Too Many Requests"])
def test_no_request_during_back_off(
    tier: MinioTier, proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    monkeypatch.setattr(pool, "LONGEST_REST", 60.0)
    proxy.fault = busy(status, 60)
    assert load(tier)[0] == LoadResult.FAILED
    asked, began = proxy.requests, time.monotonic()
    for _ in range(10):
        assert load(tier)[0] == LoadResult.FAILED
        with pytest.raises(TierError, match="back off"):
            tier.lookup(STRANGER, soon())
    assert time.monotonic() - began < 30, "waited for the server instead of giving up"
    assert proxy.requests == asked


def test_back_off_is_bounded(
    tier: MinioTier, proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "LONGEST_REST", 0.2)
    proxy.fault = busy("503 Service Unavailable", 3600)
    assert load(tier)[0] == LoadResult.FAILED
    proxy.fault = NO_FAULT
    deadline = soon()
    while load(tier) != [LoadResult.LOADED] * 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_server_answers_meanwhile(
    minio_config: MinioConfig, proxy: HttpFaultProxy, open_tier: OpenTier, tier: MinioTier
) -> None:
    both = open_tier(
        msgspec.structs.replace(minio_config, endpoint=f"{proxy.url},{minio_config.endpoint}")
    )
    assert load(both) == [LoadResult.LOADED] * 3
    proxy.fault = busy("503 Service Unavailable", 60)
    attempts = [load(both) for _ in range(6)]
    assert attempts[-1] == [LoadResult.LOADED] * 3
    assert proxy.requests > 0
