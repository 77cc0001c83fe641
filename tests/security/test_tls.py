"""Mutual TLS: which clients are served, and which servers are trusted."""

import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
import pytest
from cryptography import x509
from memkv_testbed.certificates import Authority, Certificate
from memkv_testbed.tcp_proxy import Fault, TcpProxy

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http.endpoints import parse_endpoints
from memkv_sglang.tiers.minio.http.errors import ConnectError
from memkv_sglang.tiers.minio.http.pool import ConnectionPool
from memkv_sglang.tiers.minio.http.tls import tls_context
from memkv_sglang.tiers.minio.objects.bulk_client import WHY_NOT
from memkv_sglang.tiers.minio.transfers import PageTransfers
from tests.agent.agent_harness import eventually
from tests.security.tls_terminator import TlsTerminator

OpenTier = Callable[[MinioConfig], MinioTier]
NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 4).keys()


@pytest.fixture
def port(minio_config: MinioConfig) -> int:
    return urlsplit(minio_config.endpoint).port or 0


@pytest.fixture
def mutual_tls(port: int, authority: Authority) -> Iterator[TlsTerminator]:
    """A server that requires client certificates."""
    with TlsTerminator(port, authority.issue("server"), authority.file) as terminator:
        yield terminator


def secured(
    config: MinioConfig, server: TlsTerminator, authority: Authority, own: Certificate | None
) -> MinioConfig:
    return msgspec.structs.replace(
        config,
        endpoint=server.url,
        require_tls=True,
        ca_file=str(authority.file),
        cert_file=str(own.cert_file) if own else "",
        key_file=str(own.key_file) if own else "",
    )


def assert_served(tier: MinioTier) -> None:
    """Use both the data path and the control path."""
    spill(tier, KEYS)
    load(tier, KEYS)
    tier.describe(NAMESPACE)
    assert tier.namespaces() == {NAMESPACE.digest: NAMESPACE}
    assert tier.clear(NAMESPACE.digest) == len(KEYS)


def assert_refused(config: MinioConfig, tier: MinioTier, reason: str) -> None:
    """Check that both the control path and the data path fail."""
    with pytest.raises(TierError, match=reason):
        tier.check(soon())
    page = make_page(KEYS[0], LENGTHS, filled=False)
    assert tier.load([page], soon()) == [LoadResult.FAILED]
    pool = ConnectionPool(
        parse_endpoints(config),
        context=tls_context(config),
        connect_timeout=5.0,
        stall_timeout=5.0,
        keep=1,
    )
    with pytest.raises(ConnectError, match=reason), pool.lend(soon()):
        pass
    pool.close()


def test_node_with_a_certificate_is_served(
    minio_config: MinioConfig, mutual_tls: TlsTerminator, authority: Authority, open_tier: OpenTier
) -> None:
    config = secured(minio_config, mutual_tls, authority, authority.issue("node", ["node-1"]))
    assert_served(open_tier(config))


@pytest.mark.parametrize("kind", ["none", "foreign", "expired"])
def test_node_without_a_valid_certificate_is_rejected(
    minio_config: MinioConfig,
    mutual_tls: TlsTerminator,
    authority: Authority,
    open_tier: OpenTier,
    tmp_path: Path,
    kind: str,
) -> None:
    own = None
    if kind == "foreign":
        own = Authority(tmp_path / "foreign").issue("node")
    elif kind == "expired":
        own = authority.issue("node", expired=True)
    tier = open_tier(secured(minio_config, mutual_tls, authority, own))
    # TLS 1.3: the client learns of the rejection when it reads the first response.
    with pytest.raises(TierError, match=r"(?i)ssl|closed|reset|aborted"):
        tier.check(soon())
    page = make_page(KEYS[0], LENGTHS, filled=False)
    assert tier.load([page], soon()) == [LoadResult.FAILED]


@pytest.mark.parametrize(
    ("names", "expired", "reason"),
    [(["127.0.0.1"], True, "expired"), (["minio.example", "127.0.0.2"], False, "mismatch")],
)
def test_server_with_a_wrong_certificate_is_rejected(
    minio_config: MinioConfig,
    port: int,
    authority: Authority,
    open_tier: OpenTier,
    names: list[str],
    expired: bool,
    reason: str,
) -> None:
    with TlsTerminator(port, authority.issue("server", names, expired=expired)) as server:
        config = secured(minio_config, server, authority, None)
        assert_refused(config, open_tier(config), reason)


def test_server_of_another_authority_is_rejected(
    minio_config: MinioConfig, port: int, authority: Authority, open_tier: OpenTier, tmp_path: Path
) -> None:
    impostor = Authority(tmp_path / "impostor").issue("server")
    with TlsTerminator(port, impostor) as server:
        config = secured(minio_config, server, authority, None)
        assert_refused(config, open_tier(config), "certificate verify failed")


class LaxAuthority(Authority):
    """Issues certificates without key identifiers, like many private authorities."""

    def _builder(self, *arguments: Any) -> x509.CertificateBuilder:
        builder = super()._builder(*arguments)
        builder._extensions.clear()
        return builder


def test_certificates_that_python_3_13_refuses_are_explained(
    minio_config: MinioConfig,
    port: int,
    open_tier: OpenTier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_context = ssl.create_default_context

    def strict_context(*positional: Any, **arguments: Any) -> ssl.SSLContext:
        context = make_context(*positional, **arguments)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict_context)
    lax = LaxAuthority(tmp_path / "lax")
    with TlsTerminator(port, lax.issue("server")) as server:
        config = secured(minio_config, server, lax, None)
        assert_refused(config, open_tier(config), "Authority Key Identifier; reissue")


def test_plain_http_is_rejected_if_tls_is_required() -> None:
    for urls in ("http://minio:9000", "https://minio:9000,http://minio-2:9000"):
        with pytest.raises(ConfigError, match="minio-require-tls"):
            load_config(None, {}, {"minio.endpoint": urls, "minio.require_tls": "true"})


def test_old_protocols_are_disabled(authority: Authority) -> None:
    source = tls_context(MinioConfig(endpoint="https://minio", ca_file=str(authority.file)))
    assert source is not None
    context = source()
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname


def broken(config: MinioConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        MinioTier(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_unusable_certificates_are_one_line(authority: Authority) -> None:
    one, two = authority.issue("one"), authority.issue("two")
    locked = authority.issue("locked", password=b"a password")
    opened = authority.issue("opened")
    opened.key_file.chmod(0o644)
    base = MinioConfig(endpoint="https://minio", ca_file=str(authority.file))

    def using(cert: Path, key: Path) -> MinioConfig:
        return msgspec.structs.replace(base, cert_file=str(cert), key_file=str(key))

    missing = authority.file.with_name("missing")
    assert "key values mismatch" in broken(using(one.cert_file, two.key_file))
    assert "without a password" in broken(using(locked.cert_file, locked.key_file))
    assert "chmod 600" in broken(using(opened.cert_file, opened.key_file))
    assert "minio.cert_file" in broken(using(missing, one.key_file))
    assert "minio.key_file" in broken(using(one.cert_file, missing))
    assert "minio.cert_file" in broken(using(one.key_file, one.key_file))


def test_certificate_and_key_are_set_together() -> None:
    for name in ("cert_file", "key_file"):
        with pytest.raises(ConfigError, match=rf"minio-{name.replace('_', '-')}: set without"):
            load_config(None, {}, {f"minio.{name}": "/a.pem"})


def test_changed_certificates_are_used_without_a_restart(
    minio_config: MinioConfig,
    port: int,
    authority: Authority,
    open_tier: OpenTier,
    tmp_path: Path,
) -> None:
    """Both sides move to another authority, as when a company replaces its own."""
    own = authority.issue("node")
    files = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
    ca_file, cert_file, key_file = files
    key_file.touch(mode=0o600)

    def install(issuer: Authority, certificate: Certificate) -> None:
        ca_file.write_bytes(issuer.file.read_bytes())
        cert_file.write_bytes(certificate.cert_file.read_bytes())
        key_file.write_bytes(certificate.key_file.read_bytes())

    install(authority, own)
    with TlsTerminator(port, authority.issue("server"), authority.file) as server:
        config = msgspec.structs.replace(
            minio_config,
            endpoint=server.url,
            ca_file=str(ca_file),
            cert_file=str(cert_file),
            key_file=str(key_file),
        )
        tier = open_tier(config)
        spill(tier, KEYS)
        address = server.port
    successor = Authority(tmp_path / "successor")
    with TlsTerminator(port, successor.issue("server"), successor.file, address):
        install(successor, successor.issue("node"))
        page = make_page(KEYS[0], LENGTHS, filled=False)
        eventually(lambda: tier.load([page], soon()) == [LoadResult.LOADED])


LARGE = [3 << 20, 1 << 20]
"""Buffers of a page that take several TLS writes."""

MANY = make_chain(make_namespace(page_bytes=sum(LARGE)), 20).keys()
"""More pages than there are connections."""


@pytest.mark.skipif(WHY_NOT != "", reason="not compiled: needs a C compiler with headers")
def test_pages_take_the_fast_path(
    minio_config: MinioConfig,
    mutual_tls: TlsTerminator,
    authority: Authority,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Session tickets, which servers send after the handshake, are no reason to fall back."""

    def fail(*_: object) -> None:
        raise AssertionError("a page took the slow path")

    monkeypatch.setattr(PageTransfers, "_load_page", fail)
    monkeypatch.setattr(PageTransfers, "_spill_page", fail)
    config = secured(minio_config, mutual_tls, authority, authority.issue("node"))
    tier, other = open_tier(config), open_tier(config)
    pages = [make_page(key, LARGE, filled=True) for key in MANY]
    assert tier.spill(pages, soon()) == [SpillResult.STORED] * len(MANY)
    loaded = [make_page(key, LARGE, filled=False) for key in MANY]
    assert other.load(loaded, soon()) == [LoadResult.LOADED] * len(MANY)
    assert all(map(holds_content, loaded))
    for node in (tier, other):
        assert not any(node.telemetry.fallbacks().values())


@pytest.mark.parametrize("action", ["close", "reset", "stall"])
@pytest.mark.parametrize("after", [1000, 2 << 20])
def test_uploads_that_break_off(
    minio_config: MinioConfig,
    mutual_tls: TlsTerminator,
    authority: Authority,
    open_tier: OpenTier,
    action: Literal["close", "reset", "stall"],
    after: int,
) -> None:
    with TcpProxy("127.0.0.1", urlsplit(mutual_tls.url).port or 0) as proxy:
        direct = secured(minio_config, mutual_tls, authority, authority.issue("node"))
        config = msgspec.structs.replace(
            direct, endpoint=f"https://127.0.0.1:{proxy.port}", stall_timeout=0.5
        )
        tier = open_tier(config)
        tier.check(soon())
        pages = [make_page(key, LARGE, filled=True) for key in KEYS]
        proxy.fault = Fault(action, after, "request")
        assert set(tier.spill(pages, time.monotonic() + 3)) == {SpillResult.FAILED}
        proxy.fault = None
        other = open_tier(direct)
        eventually(lambda: max(tier.spill(pages, soon())) <= SpillResult.PRESENT)
        loaded = [make_page(key, LARGE, filled=False) for key in KEYS]
        assert other.load(loaded, soon()) == [LoadResult.LOADED] * len(KEYS)
        assert all(map(holds_content, loaded))
