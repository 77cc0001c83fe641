"""The fast path stores the pages of a call at once; the slow path stores the rest one by one."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Page, page_checksum
from memkv_sglang.testing.conformance import LENGTHS, soon
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.auth.signing import Signer, credential_provider
from memkv_sglang.tiers.minio.http.endpoints import parse_endpoints
from memkv_sglang.tiers.minio.names import CHECKSUM, size_fields
from memkv_sglang.tiers.minio.objects import bulk_client

pytestmark = pytest.mark.skipif(
    bulk_client.WHY_NOT != "", reason="not compiled: needs a C compiler with Python's headers"
)

OpenTier = Callable[[MinioConfig], MinioTier]

KEYS = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 40).keys()


@pytest.fixture(params=[2, 64])
def tier(
    request: pytest.FixtureRequest,
    minio_config: MinioConfig,
    proxy: HttpFaultProxy,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
) -> MinioTier:
    """An empty tier, on a machine with two cores and on one with many."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(request.param)))
    tier = open_tier(msgspec.structs.replace(minio_config, endpoint=proxy.url, stall_timeout=20.0))
    tier.check(soon())
    return tier


def spill(tier: MinioTier) -> list[SpillResult]:
    return tier.spill([make_page(key, LENGTHS, filled=True) for key in KEYS], soon())


def stored(open_tier: OpenTier, config: MinioConfig) -> list[bool]:
    """Return which pages another node can load, with the right content."""
    node = open_tier(config)
    held = []
    for key in KEYS:
        page = make_page(key, LENGTHS, filled=False)
        held.append(node.load([page], soon()) == [LoadResult.LOADED])
        assert held[-1] <= holds_content(page)
    return held


def test_each_page_is_sent_once(
    tier: MinioTier, proxy: HttpFaultProxy, open_tier: OpenTier, minio_config: MinioConfig
) -> None:
    before = proxy.requests
    assert set(spill(tier)) == {SpillResult.STORED}
    assert proxy.requests == before + len(KEYS)
    assert not any(tier.telemetry.fallbacks().values())
    assert all(stored(open_tier, minio_config))
    assert set(spill(tier)) == {SpillResult.PRESENT}
    assert proxy.requests == before + len(KEYS)


@pytest.mark.parametrize("encrypted", [False, True])
def test_both_paths_store_the_same_objects(
    minio_config: MinioConfig,
    admin: Minio,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    encrypted: bool,
) -> None:
    if encrypted:
        keys = tmp_path / "keys.toml"
        keys.touch(0o600)
        keys.write_text(f'write = "k"\n[keys]\nk = "{"5a" * 32}"\n')
        minio_config = msgspec.structs.replace(minio_config, encryption_key_file=str(keys))
    tier = open_tier(minio_config)
    pages = [make_page(key, LENGTHS, filled=True) for key in KEYS[:2]]
    assert tier.spill(pages[:1], soon()) == [SpillResult.STORED]
    monkeypatch.setattr(bulk_client, "WHY_NOT", "no compiler")
    assert tier.spill(pages[1:], soon()) == [SpillResult.STORED]
    found = []
    for key in KEYS[:2]:
        name = tier._names.page(key)
        fields = admin.stat_object(minio_config.bucket, name).metadata or {}
        content = admin.get_object(minio_config.bucket, name).read()
        own = {k: v for k, v in fields.items() if k.startswith("x-amz-meta-memkv-")}
        assert own.pop(CHECKSUM) == page_checksum(key, [memoryview(content)]).hex()
        found.append((own, len(content)))
    assert found[0] == found[1]


def test_requests_are_signed_as_on_the_slow_path(
    minio_config: MinioConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Signer(credential_provider(minio_config), "region")
    [endpoint] = parse_endpoints(minio_config)
    credentials = signer.credentials(soon())
    monkeypatch.setattr(
        "memkv_sglang.tiers.minio.auth.signing.request_date", lambda: "20261130T120000Z"
    )
    fields = size_fields(10)
    template = signer.template(credentials, "PUT", endpoint, fields, CHECKSUM)
    head = signer.head(credentials, "PUT", endpoint, "/page", {**fields, CHECKSUM: "0123"})
    signature = head[-68:-4]
    assert template.lines + b"0123" + template.lines_end + signature + b"\r\n\r\n" in head
    assert template.canonical.endswith(f"\n{CHECKSUM}:".encode())


STATUSES = {
    "forbidden": b"403 Forbidden",
    "missing bucket": b"404 Not Found",
    "precondition failed": b"412 Precondition Failed",
    "too many": b"429 Too Many Requests",
    "error": b"500 Internal Server Error",
    "busy": b"503 Slow Down",
}


@pytest.mark.parametrize("status", STATUSES.values(), ids=STATUSES)
def test_pages_that_the_server_refuses_are_not_acknowledged(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    open_tier: OpenTier,
    minio_config: MinioConfig,
    status: bytes,
) -> None:
    proxy.fault = HttpFault(
        methods=("PUT",), answer=b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"
    )
    assert set(spill(tier)) == {SpillResult.FAILED}
    assert tier.telemetry.fallbacks()["status"] >= 1
    assert tier.telemetry.counts()["spill_failed"] >= 1
    proxy.fault = NO_FAULT
    assert not any(stored(open_tier, minio_config))


def test_pages_that_may_only_be_written_once(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    open_tier: OpenTier,
    minio_config: MinioConfig,
) -> None:
    """A real server refuses the precondition, and keeps the first version."""
    assert spill(open_tier(minio_config)) == [SpillResult.STORED] * len(KEYS)
    proxy.fault = HttpFault(
        methods=("PUT",),
        edit_request=lambda head: head.replace(b"\r\n\r\n", b"\r\nIf-None-Match: *\r\n\r\n"),
    )
    assert set(spill(tier)) == {SpillResult.FAILED}
    assert tier.telemetry.fallbacks()["status"] >= 1
    assert all(stored(open_tier, minio_config))


def test_full_server(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    proxy.fault = HttpFault(
        methods=("PUT",), answer=b"HTTP/1.1 507 Full\r\nContent-Length: 0\r\n\r\n"
    )
    assert spill(tier)[0] is SpillResult.REFUSED


@pytest.mark.parametrize(
    ("reason", "edit"),
    [
        ("interim", lambda head: b"HTTP/1.1 100 Continue\r\n\r\n" + head),
        ("close", lambda head: head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")),
    ],
)
def test_unusual_responses_do_not_fail_a_spill(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    open_tier: OpenTier,
    minio_config: MinioConfig,
    reason: str,
    edit: Callable[[bytes], bytes],
) -> None:
    proxy.fault = HttpFault(methods=("PUT",), edit_response=edit)
    assert set(spill(tier)) == {SpillResult.STORED}
    assert tier.telemetry.fallbacks()[reason] >= 1
    assert all(stored(open_tier, minio_config))


@pytest.mark.parametrize("cut", ["reset", "close"])
def test_connections_that_end_in_the_middle_of_some_pages(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    open_tier: OpenTier,
    minio_config: MinioConfig,
    cut: str,
) -> None:
    fault = HttpFault(methods=("PUT",), cut=cut, every=7)  # type: ignore[arg-type]  # its literals
    proxy.fault = fault
    results = spill(tier)
    proxy.fault = NO_FAULT
    held = stored(open_tier, minio_config)
    for result, is_stored in zip(results, held, strict=True):
        assert (result is SpillResult.STORED) <= is_stored
    assert sum(tier.telemetry.fallbacks().values()) >= 1


def test_server_that_stalls(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    tier.access.pool.stall_timeout = 0.3
    proxy.fault = HttpFault(methods=("PUT",), cut="stall")
    results = spill(tier)
    proxy.fault = NO_FAULT
    assert set(results) == {SpillResult.FAILED}


def test_page_that_changed_after_it_was_read(tier: MinioTier) -> None:
    pages = [make_page(key, LENGTHS, filled=True) for key in KEYS]
    pages[20] = pages[20]._replace(checksum=bytes(16))
    results = tier.spill(pages, soon())
    assert results[:20] == [SpillResult.STORED] * 20
    assert results[20] is SpillResult.FAILED
    assert tier.telemetry.fallbacks()["changed"] >= 1
    assert not tier.present([KEYS[20]], soon())[0]


def test_pages_of_several_lengths(tier: MinioTier) -> None:
    pages = [make_page(key, [*LENGTHS, number + 1], filled=True) for number, key in enumerate(KEYS)]
    assert tier.spill(pages, soon()) == [SpillResult.STORED] * len(KEYS)
    targets = [Page(p.key, tuple(memoryview(bytearray(len(b))) for b in p.buffers)) for p in pages]
    assert tier.load(targets, soon()) == [LoadResult.LOADED] * len(KEYS)
    assert all(map(holds_content, targets))
