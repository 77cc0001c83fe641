"""Responses with status 200 that do not mean success, from a server or a proxy in front of it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from memkv_testbed.http_proxy import NO_FAULT, HttpFault, HttpFaultProxy
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.objects import bulk_client
from memkv_sglang.tiers.minio.retention.entries import entries
from tests.cases.minio_tiers import LIMIT, PAGE, chain_of, load, opened, soon, spill, with_field
from tests.cli.cli_node import PAGES, running_agent, spill_chain

CHAIN = chain_of(6, "stored")
NAMES = ObjectNames("")

OK = b"HTTP/1.1 200 OK\r\n"
ETAG = b'ETag: "0123"\r\n'
FORMAT = b"x-amz-meta-memkv-format: 1\r\n"
SIZE = b"x-amz-meta-memkv-length: %d\r\nContent-Length: %d\r\n" % (PAGE, PAGE)
CHECKSUM = b"x-amz-meta-memkv-checksum: "
SUM = CHECKSUM + b"0" * 32 + b"\r\n"

HEADS = {
    "a portal": b"Content-Length: 10\r\n",
    "a web page": b"Content-Type: text/html\r\nContent-Length: 600\r\n",
    "a web page with an etag": ETAG + b"Content-Type: text/html\r\nContent-Length: 600\r\n",
    "the right length": ETAG + b"Content-Length: %d\r\n" % PAGE,
    "no checksum": ETAG + FORMAT + SIZE,
    "no format": ETAG + SIZE + SUM,
    "no length": ETAG + FORMAT + SUM + b"Content-Length: %d\r\n" % PAGE,
    "another format": ETAG + b"x-amz-meta-memkv-format: 2\r\n" + SIZE + SUM,
    "another length": ETAG + FORMAT + SIZE.replace(b"length: ", b"length: 1", 1) + SUM,
    "a short checksum": ETAG + FORMAT + SIZE + CHECKSUM + b"00\r\n",
    "a strange checksum": ETAG + FORMAT + SIZE + CHECKSUM + b"g" * 32 + b"\r\n",
    "two checksums": ETAG + FORMAT + SIZE + SUM + SUM,
}


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        yield proxy


@pytest.fixture
def tier(minio_config: MinioConfig, proxy: HttpFaultProxy) -> Iterator[MinioTier]:
    with opened(minio_config, proxy, negative_ttl=0.0) as tier:
        yield tier


def stored(admin: Minio, config: MinioConfig) -> list[str]:
    found = admin.list_objects(config.bucket, recursive=True)
    names = (item.object_name or "" for item in found)
    return [name for name in names if ObjectNames("").page_key(name)]


@pytest.fixture
def admin(minio_server: MinioServer) -> Minio:
    return Minio(minio_server.endpoint.partition("://")[2], *minio_server.root, secure=False)


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_a_200_without_our_metadata_is_no_page(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    minio_config: MinioConfig,
    admin: Minio,
    fields: bytes,
) -> None:
    proxy.fault = HttpFault(methods=("HEAD",), answer=OK + fields + b"\r\n")
    assert tier.lookup(CHAIN, soon()) == (0, True)
    assert tier.present(CHAIN.keys(), soon()) == [False] * 6
    assert tier.telemetry.counts()["answer_is_no_page"] >= 6
    assert spill(tier, CHAIN) == [SpillResult.STORED] * 6
    assert len(stored(admin, minio_config)) == 6
    proxy.fault = NO_FAULT
    assert load(tier, CHAIN) == [LoadResult.LOADED] * 6


def test_uploads_are_sent_while_every_head_is_answered_with_200(
    proxy: HttpFaultProxy, minio_config: MinioConfig, admin: Minio, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    proxy.fault = HttpFault(methods=("HEAD",), answer=OK + b"Content-Length: 10\r\n\r\n")
    admin.make_bucket(minio_config.bucket)
    environ = {
        "MEMKV_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock"),
        "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
        "MEMKV_NVME_CAPACITY": "64MiB",
        "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
        "MEMKV_MINIO_ENDPOINT": proxy.url,
        "MEMKV_MINIO_BUCKET": minio_config.bucket,
        "MEMKV_MINIO_ACCESS_KEY": minio_config.access_key,
        "MEMKV_MINIO_SECRET_KEY": minio_config.secret_key,
    }
    with running_agent(environ) as client:
        spill_chain(client)
        assert client.flush(LIMIT)
    assert len(stored(admin, minio_config)) == PAGES


HTML = b"<html>please log in</html>"

GETS = {
    "a portal": OK + b"Content-Length: 2\r\n\r\nok",
    "a web page": OK + b"Content-Type: text/html\r\nContent-Length: 26\r\n\r\n" + HTML,
    "a web page with an etag": OK + ETAG + b"Content-Length: 26\r\n\r\n" + HTML,
    "as many bytes": OK + b"Content-Length: %d\r\n\r\n" % PAGE + bytes(PAGE),
    "as many bytes with an etag": OK + ETAG + b"Content-Length: %d\r\n\r\n" % PAGE + bytes(PAGE),
    "our metadata, no etag": OK + FORMAT + SIZE + SUM + b"\r\n" + bytes(PAGE),
    "a part": b"HTTP/1.1 206 Partial Content\r\n"
    + ETAG
    + FORMAT
    + SIZE
    + SUM
    + b"\r\n"
    + bytes(PAGE),
    "nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n" + ETAG + b"\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
    "a permanent redirect": b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n",
    "an endless head": OK + b"x: y\r\n" * 5000 + b"\r\n",
    "half a head": OK[:9],
    "a huge length": OK + ETAG + b"Content-Length: 999999999999999999\r\n\r\n",
    "a longer length": OK + b"Content-Length: 9999999999999999999\r\n\r\n",
    "a negative length": OK + b"Content-Length: -1\r\n\r\n",
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("answer", GETS.values(), ids=GETS)
def test_a_response_without_a_page_is_a_miss(
    tier: MinioTier,
    proxy: HttpFaultProxy,
    minio_config: MinioConfig,
    admin: Minio,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
    compiled: bool,
) -> None:
    if not compiled:
        monkeypatch.setattr(bulk_client, "WHY_NOT", "not compiled")
    spill(tier, CHAIN)
    names = stored(admin, minio_config)
    proxy.fault = HttpFault(methods=("GET",), answer=answer)
    results = load(tier, CHAIN, seconds=1.0)
    assert results[0] in (LoadResult.FAILED, LoadResult.MISSING)
    assert LoadResult.CORRUPT not in results
    proxy.fault = NO_FAULT
    assert stored(admin, minio_config) == names
    assert load(tier, CHAIN) == [LoadResult.LOADED] * 6


PUTS = {
    "a portal": OK + b"Content-Length: 2\r\n\r\nok",
    "a web page": OK + b"Content-Type: text/html\r\nContent-Length: 26\r\n\r\n" + HTML,
    "nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
    "created": b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
    "accepted": b"HTTP/1.1 202 Accepted\r\n" + ETAG + b"Content-Length: 0\r\n\r\n",
    "an error in a 200": OK
    + b"Content-Length: 41\r\n\r\n<Error><Code>InternalError</Code></Error>",
}


@pytest.mark.parametrize("answer", PUTS.values(), ids=PUTS)
def test_a_put_counts_only_with_an_etag(
    tier: MinioTier, proxy: HttpFaultProxy, answer: bytes
) -> None:
    proxy.fault = HttpFault(methods=("PUT",), answer=answer)
    assert SpillResult.STORED not in spill(tier, CHAIN)
    proxy.fault = NO_FAULT
    assert spill(tier, CHAIN) == [SpillResult.STORED] * 6


@pytest.mark.parametrize("fields", HEADS.values(), ids=HEADS)
def test_a_renewal_never_copies_the_metadata_of_a_lie(
    tier: MinioTier, proxy: HttpFaultProxy, fields: bytes
) -> None:
    spill(tier, CHAIN)
    year = 365 * 86400
    rows = [(key.namespace + key.hash, PAGE, int(time.time()), 1, 0) for key in CHAIN.keys()]
    past = b"Last-Modified: Sun, 06 Nov 2022 08:49:37 GMT\r\n"
    dated = b"Date: %b\r\n" % time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()).encode()
    proxy.fault = HttpFault(methods=("HEAD",), answer=OK + fields + past + dated + b"\r\n")
    tier.retention.parts().renewer.renew(entries(rows), 30, time.time() + year)
    proxy.fault = NO_FAULT
    assert load(tier, CHAIN) == [LoadResult.LOADED] * 6


def test_valid_heads_with_extra_fields_are_pages(tier: MinioTier, proxy: HttpFaultProxy) -> None:
    spill(tier, CHAIN)
    tier.invalidate(CHAIN.keys())
    proxy.fault = HttpFault(
        methods=("HEAD",), edit_response=with_field(b"Content-Type", b"text/html")
    )
    assert tier.present(CHAIN.keys(), soon()) == [True] * 6
    assert tier.lookup(CHAIN, soon()) == (6, True)
