"""Access to servers: TLS, credentials, addressing and missing buckets."""

import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from memkv_testbed.certificates import Authority
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http.endpoints import parse_endpoints
from memkv_sglang.tiers.minio.http.errors import ConnectError
from memkv_sglang.tiers.minio.http.pool import ConnectionPool

OpenTier = Callable[[MinioConfig], MinioTier]
LENGTHS = (300_000, 300_000)
CHAIN = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 8)


def soon() -> float:
    return time.monotonic() + 30


def assert_works(tier: MinioTier) -> None:
    pages = [make_page(key, LENGTHS, filled=True) for key in CHAIN.keys()]
    assert set(tier.spill(pages, soon())) == {SpillResult.STORED}
    pages = [make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()]
    assert set(tier.load(pages, soon())) == {LoadResult.LOADED}
    assert all(map(holds_content, pages))
    assert tier.remove(CHAIN.keys()) == len(pages)
    assert tier.lookup(CHAIN, soon()) == (0, True)


@pytest.fixture
def tls_config(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MinioConfig]:
    authority = Authority(tmp_path)
    names = [getattr(request, "param", "127.0.0.1")]
    certs_dir = authority.issue("certs", names).cert_file.parent
    with MinioServer(certs_dir=certs_dir) as server:
        yield MinioConfig(
            endpoint=server.endpoint,
            ca_file=str(authority.file),
            access_key=server.access_key,
            secret_key=server.secret_key,
        )


def test_tls_with_an_authority_of_our_own(tls_config: MinioConfig, open_tier: OpenTier) -> None:
    assert tls_config.endpoint.startswith("https://")
    assert_works(open_tier(tls_config))


@pytest.mark.parametrize("tls_config", ["elsewhere.example"], indirect=True)
def test_certificate_of_another_host_is_refused(
    tls_config: MinioConfig, open_tier: OpenTier
) -> None:
    with pytest.raises(TierError, match="certificate"):
        open_tier(tls_config).check(soon())
    pool = ConnectionPool(
        parse_endpoints(tls_config),
        context=lambda: ssl.create_default_context(cafile=tls_config.ca_file),
        connect_timeout=1.0,
        stall_timeout=1.0,
        keep=1,
    )
    with pytest.raises(ConnectError, match="certificate"), pool.lend(soon()):
        pass
    pool.close()


def test_unknown_authority_is_refused(tls_config: MinioConfig, open_tier: OpenTier) -> None:
    tier = open_tier(msgspec.structs.replace(tls_config, ca_file=""))
    with pytest.raises(TierError, match="certificate"):
        tier.check(soon())


def test_authorities_that_cannot_be_read(tls_config: MinioConfig, tmp_path: Path) -> None:
    for content in (None, "no certificate"):
        file = tmp_path / "other.pem"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigError, match=r"minio\.ca_file"):
            MinioTier(msgspec.structs.replace(tls_config, ca_file=str(file)))


def test_virtual_host_addressing(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def resolve_localhost(host: Any, *arguments: Any, **named: Any) -> Any:
        """Names under `localhost` are loopback (RFC 6761), but not all resolvers know this."""
        under = isinstance(host, str) and host.endswith(".localhost")
        return resolve("127.0.0.1" if under else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost)
    with MinioServer(env={"MINIO_DOMAIN": "localhost"}) as server:
        config = MinioConfig(
            endpoint=f"http://localhost:{server.port}",
            addressing="virtual",
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        assert parse_endpoints(config)[0].netloc == f"memkv.localhost:{server.port}"
        tier = open_tier(config)
        assert_works(tier)
        tier.describe(make_namespace())
        assert list(tier.namespaces().values()) == [make_namespace()]


def test_virtual_host_addressing_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"minio\.addressing"):
        MinioTier(MinioConfig(endpoint="http://127.0.0.1:9000", addressing="virtual"))


def test_credentials_from_the_environment(
    minio_config: MinioConfig, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIO_ACCESS_KEY", minio_config.access_key)
    monkeypatch.setenv("MINIO_SECRET_KEY", minio_config.secret_key)
    tier = open_tier(msgspec.structs.replace(minio_config, access_key="", secret_key=""))
    assert_works(tier)


def test_refused_credentials_are_not_logged(
    minio_config: MinioConfig, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "a-secret-that-is-wrong"
    tier = open_tier(msgspec.structs.replace(minio_config, secret_key=secret))
    with caplog.at_level(logging.DEBUG), pytest.raises(TierError) as refused:
        tier.check(soon())
    pages = [make_page(key, LENGTHS, filled=True) for key in CHAIN.keys()]
    assert tier.load(pages, soon())[0] == LoadResult.FAILED
    told = str(refused.value) + "".join(str(vars(record)) for record in caplog.records)
    assert secret not in told


def test_missing_bucket_that_may_not_be_made(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    tier = open_tier(msgspec.structs.replace(minio_config, create_bucket=False))
    with pytest.raises(ConfigError, match=r"minio\.bucket"):
        tier.check(soon())
    with pytest.raises(TierError, match=r"minio\.bucket"):
        tier.lookup(CHAIN, soon())


def test_many_nodes_make_the_bucket_at_once(minio_config: MinioConfig, open_tier: OpenTier) -> None:
    for tier in [open_tier(minio_config) for _ in range(6)]:
        tier.check(soon())
