"""The fast path reads the pages of a call at once; the slow path reads the rest one by one."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy
from minio import Minio
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.testing.conformance import LENGTHS, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.auth.signing import Signer, credential_provider
from memkv_sglang.tiers.minio.http import Connection, Request
from memkv_sglang.tiers.minio.http.endpoints import parse_endpoints
from memkv_sglang.tiers.minio.http.transport import PlainTransport
from memkv_sglang.tiers.minio.names import page_metadata
from memkv_sglang.tiers.minio.objects import bulk_client

loop = pytest.importorskip(
    "memkv_sglang.tiers.minio.http.bulk_loop",
    reason="not compiled: needs a C compiler with Python's headers",
    exc_type=ImportError,
)

bulk_batch = pytest.importorskip("memkv_sglang.tiers.minio.http.bulk_batch", exc_type=ImportError)

KEYS = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 40).keys()


@pytest.fixture(params=[2, 64])
def tier(
    request: pytest.FixtureRequest,
    minio_config: MinioConfig,
    proxy: HttpFaultProxy,
    open_tier: Callable[[MinioConfig], MinioTier],
    monkeypatch: pytest.MonkeyPatch,
) -> MinioTier:
    """A tier that holds the pages, on a machine with two cores and on one with many."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(request.param)))
    tier = open_tier(msgspec.structs.replace(minio_config, endpoint=proxy.url, stall_timeout=20.0))
    spill(tier, KEYS)
    return tier


def load(tier: MinioTier, deadline: float) -> list[LoadResult]:
    """Load the pages; check the content of those that are reported as loaded."""
    pages = [make_page(key, LENGTHS, filled=False) for key in KEYS]
    results = tier.load(pages, deadline)
    for page, result in zip(pages, results, strict=True):
        assert (result == LoadResult.LOADED) <= holds_content(page)
    return results


@pytest.mark.parametrize("lower", [False, True])
def test_each_page_is_asked_for_once(tier: MinioTier, proxy: HttpFaultProxy, lower: bool) -> None:
    if lower:  # some proxies change the case of field names
        proxy.fault = HttpFault(edit_response=lambda head: head[:12] + head[12:].lower())
    before = proxy.requests
    assert set(load(tier, soon())) == {LoadResult.LOADED}
    assert proxy.requests == before + len(KEYS)


def test_installation_without_a_compiled_loop(
    tier: MinioTier, proxy: HttpFaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.tiers.minio.objects.bulk_client.WHY_NOT", "no compiler")
    before = proxy.requests
    assert set(load(tier, soon())) == {LoadResult.LOADED}
    assert proxy.requests == before + len(KEYS)


def test_missing_page_ends_the_load(
    tier: MinioTier, admin: Minio, minio_config: MinioConfig
) -> None:
    [entry] = admin.list_objects(
        minio_config.bucket, prefix=tier._names.page(KEYS[20]), recursive=True
    )
    admin.remove_object(minio_config.bucket, entry.object_name or "")
    results = load(tier, soon())
    assert results[:21] == [LoadResult.LOADED] * 20 + [LoadResult.MISSING]
    assert set(results[21:]) <= {LoadResult.LOADED, LoadResult.SKIPPED}


def test_requests_are_signed_and_in_order(minio_config: MinioConfig) -> None:
    """The compiled signature equals that of the slow path."""
    signer = Signer(credential_provider(minio_config), "region")
    [endpoint] = parse_endpoints(minio_config)
    credentials = signer.credentials(soon())
    template = signer.template(credentials, "GET", endpoint)
    requests = [
        Request(b"page%%20%d" % i, make_page(KEYS[0], [6], filled=False)) for i in range(30)
    ]
    batch = bulk_batch.Download(requests, {endpoint: template}, page_metadata())
    ours, theirs = socket.socketpair()
    heads: list[bytes] = []

    def serve() -> None:
        with theirs:
            while head := theirs.recv(1 << 16):
                heads.append(head)
                theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nmemkv!")

    thread = threading.Thread(target=serve)
    thread.start()
    connection = Connection(endpoint, PlainTransport(ours), 5.0)
    loop.transfer([connection], batch, soon(), 5.0)
    connection.close()
    thread.join()
    date = template.text.split(b"\n")[1].decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memkv_sglang.tiers.minio.auth.signing.request_date", lambda: date)
        assert heads == [
            signer.head(credentials, "GET", endpoint, endpoint.base_path + f"page%20{i}", {})
            for i in range(30)
        ]


def test_no_request_after_a_stop(minio_config: MinioConfig) -> None:
    [endpoint] = parse_endpoints(minio_config)
    signer = Signer(credential_provider(minio_config), "region")
    template = signer.template(signer.credentials(soon()), "GET", endpoint)
    page = make_page(KEYS[0], LENGTHS, filled=False)
    batch = bulk_batch.Download([Request(b"page", page)], {endpoint: template}, page_metadata())
    batch.stop()
    ours, theirs = socket.socketpair()
    with theirs:
        connection = Connection(endpoint, PlainTransport(ours), 5.0)
        loop.transfer([connection], batch, soon(), 5.0)
        connection.close()
        assert theirs.recv(1) == b""


def test_closed_connections_do_not_fail_a_load(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    met = threading.Event()

    def once(head: bytes) -> bytes:
        if met.is_set():
            return head
        met.set()
        return head.replace(b"200 OK", b"500 Oops")

    proxy.fault = HttpFault(methods=("GET",), edit_response=once)
    assert set(load(tier, soon())) == {LoadResult.LOADED}


def test_one_server_that_stalls_ends_the_load(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    """The other connections stop too, since their pages could not be used."""
    hold = threading.Event()

    def wait(head: bytes) -> bytes:
        proxy.fault = HttpFault(methods=("GET",), rate=10 * sum(LENGTHS))
        hold.wait(60)
        return head

    tier.access.pool.stall_timeout = 0.3
    proxy.fault = HttpFault(methods=("GET",), edit_response=wait)
    results = load(tier, soon())
    hold.set()
    assert LoadResult.FAILED in results


def test_invalid_date_does_not_fail_a_load(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    tier.keep_limits(CollectorConfig(), Metrics(CollectorRegistry()))
    proxy.fault = HttpFault(
        edit_response=lambda head: re.sub(
            rb"(Last-Modified: \w+, )\d+", rb"\g<1>" + b"9" * 20, head
        )
    )
    assert set(load(tier, soon())) == {LoadResult.LOADED}


def test_no_pages(tier: MinioTier) -> None:
    assert tier.load([], soon()) == []


def test_deadline_while_bytes_keep_coming(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    proxy.fault = HttpFault(methods=("GET",), rate=sum(LENGTHS))  # one page per second
    pages = [make_page(key, LENGTHS, filled=False) for key in KEYS]
    begin = time.monotonic()
    results = tier.load(pages, begin + 0.5)
    assert time.monotonic() - begin < 10
    then = [bytes(buffer) for page in pages for buffer in page.buffers]
    assert LoadResult.FAILED in results
    proxy.fault = NO_FAULT
    time.sleep(0.3)
    assert then == [bytes(buffer) for page in pages for buffer in page.buffers]
    assert set(load(tier, soon())) == {LoadResult.LOADED}


@pytest.mark.skipif(bulk_client.WHY_NOT != "", reason="not compiled: needs a C compiler")
@pytest.mark.parametrize(
    "damage",
    [
        "del _xxhash.__file__",
        "_xxhash.__file__ = '/nowhere.so'",
        "_xxhash.__file__ = 'libc.so.6'",
        "xxhash.xxh3_128_digest = lambda data, seed: bytes(16)",
    ],
)
def test_unusable_xxhash_is_reported_and_loads_take_the_slow_path(damage: str) -> None:
    program = f"""
import xxhash
from xxhash import _xxhash
{damage}
from memkv_sglang.tiers.minio.objects.bulk_client import WHY_NOT
assert "the xxhash package" in WHY_NOT, WHY_NOT
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_several_calls_at_once(tier: MinioTier) -> None:
    results: list[LoadResult] = []

    def call() -> None:
        for _ in range(5):
            results.extend(load(tier, soon()))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * 5 * len(KEYS)
    assert set(results) == {LoadResult.LOADED}


def test_a_blocked_call_does_not_block_others(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    held, hold = threading.Event(), threading.Event()

    def wait(head: bytes) -> bytes:
        held.set()
        hold.wait(60)
        return head

    proxy.fault = HttpFault(methods=("GET",), edit_response=wait)
    results: list[LoadResult] = []
    first = threading.Thread(target=lambda: results.extend(load(tier, soon())))
    first.start()
    held.wait()
    proxy.fault = NO_FAULT
    assert set(load(tier, soon())) == {LoadResult.LOADED}
    assert first.is_alive()
    hold.set()
    first.join()
    assert len(results) == len(KEYS)
