"""A node with a certificate but no keys, and a MinIO that issues keys for certificates."""

import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from memkv_testbed.certificates import Authority, Certificate
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.cli.checks.bucket import check_bucket
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin.policy import node_policy
from memkv_sglang.tiers.minio.auth.credentials import CertificateLogin
from memkv_sglang.tiers.minio.http.control import ControlHttp

OpenTier = Callable[[MinioConfig], MinioTier]

NAMESPACE = make_namespace()
BUCKET = "certificates"
NODE, READER = "memkv-node", "memkv-reader"
"""Common names of certificates, which are also names of policies."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("login") / "authority")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[MinioServer]:
    certs_dir = authority.issue("server").cert_file.parent
    (certs_dir / "CAs").mkdir()
    (certs_dir / "CAs" / "authority.pem").write_bytes(authority.file.read_bytes())
    with MinioServer(certs_dir=certs_dir, env={"MINIO_IDENTITY_TLS_ENABLE": "on"}) as server:
        http = ControlHttp(context=lambda: ssl.create_default_context(cafile=str(authority.file)))
        netloc = f"{server.host}:{server.port}"
        Minio(netloc, *server.root, http_client=http).make_bucket(BUCKET)
        server.users.add_policy(NODE, node_policy(BUCKET))
        server.users.add_policy(READER, node_policy(BUCKET, reader=True))
        yield server


def config_of(server: MinioServer, authority: Authority, own: Certificate) -> MinioConfig:
    return MinioConfig(
        endpoint=server.endpoint,
        bucket=BUCKET,
        create_bucket=False,
        require_tls=True,
        ca_file=str(authority.file),
        cert_file=str(own.cert_file),
        key_file=str(own.key_file),
        certificate_login=True,
    )


def test_a_node_needs_only_a_certificate(
    server: MinioServer, authority: Authority, open_tier: OpenTier
) -> None:
    node = open_tier(config_of(server, authority, authority.issue(NODE)))
    keys = make_chain(NAMESPACE, 4).keys()
    spill(node, keys)
    load(node, keys)
    reader = open_tier(config_of(server, authority, authority.issue(READER)))
    load(reader, keys)
    page = make_page(make_chain(NAMESPACE, 1, "refused").keys()[0], LENGTHS, filled=True)
    assert reader.spill([page], soon()) == [SpillResult.FAILED]


def test_a_certificate_without_policy_or_of_another_authority_gets_no_keys(
    server: MinioServer, authority: Authority, open_tier: OpenTier, tmp_path: Path
) -> None:
    foreign = Authority(tmp_path / "foreign")
    for own in (authority.issue("unknown"), foreign.issue(NODE)):
        tier = open_tier(config_of(server, authority, own))
        with pytest.raises(TierError, match=r"minio\.cert_file.*MINIO_IDENTITY_TLS_ENABLE"):
            tier.check(soon())


def test_doctor_names_the_source_of_the_keys(server: MinioServer, authority: Authority) -> None:
    for name, level, text in (
        ("doctor", "ok", "from minio.certificate_login"),
        ("nobody", "FAIL", "MINIO_IDENTITY_TLS_ENABLE"),
    ):
        own = authority.issue(name, common_name=NODE if level == "ok" else name)
        found = check_bucket(config_of(server, authority, own), CollectorConfig())
        credentials = next(finding for finding in found if finding.what == "credentials")
        assert credentials.level == level
        assert text in f"{credentials.detail} {credentials.advice}"


def test_rejected_keys_are_replaced(server: MinioServer, authority: Authority) -> None:
    login = CertificateLogin(
        config_of(server, authority, authority.issue("renewed", common_name=NODE))
    )
    first = login.retrieve()
    assert login.retrieve() is first
    login.renew()
    assert login.retrieve().access_key != first.access_key


def test_another_server_issues_keys_while_one_is_down(
    server: MinioServer, authority: Authority
) -> None:
    config = config_of(server, authority, authority.issue("second", common_name=NODE))
    with socket.socket() as taken:  # nobody listens, so connections are refused
        taken.bind(("127.0.0.1", 0))
        down = f"https://127.0.0.1:{taken.getsockname()[1]}"
        both = msgspec.structs.replace(config, endpoint=f"{down},{server.endpoint}")
        assert CertificateLogin(both).retrieve().session_token
