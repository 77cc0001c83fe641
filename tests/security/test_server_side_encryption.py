"""Server-side encryption is requested for every object that the tier writes."""

import base64
import io
import secrets
from collections.abc import Callable, Iterator

import msgspec
import pytest
from memkv_testbed.certificates import Authority
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.testing.conformance import LENGTHS, load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames

OpenTier = Callable[[MinioConfig], MinioTier]
NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 3).keys()
NAMES = ObjectNames("")
KMS_KEY = "memkv-test"


@pytest.fixture
def server(authority: Authority) -> Iterator[MinioServer]:
    """A MinIO with its own encryption key."""
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    certs_dir = authority.issue("certs").cert_file.parent
    env = {"MINIO_KMS_SECRET_KEY": f"{KMS_KEY}:{key}"}
    with MinioServer(certs_dir=certs_dir, env=env) as server:
        yield server


@pytest.mark.parametrize(("sse", "told"), [("none", None), ("s3", "AES256"), ("kms", "aws:kms")])
def test_every_object_is_stored_encrypted(
    server: MinioServer, authority: Authority, open_tier: OpenTier, sse: str, told: str | None
) -> None:
    import urllib3

    config = MinioConfig(
        endpoint=server.endpoint,
        ca_file=str(authority.file),
        access_key=server.access_key,
        secret_key=server.secret_key,
    )
    config = msgspec.structs.replace(config, sse=sse, sse_kms_key=KMS_KEY if sse == "kms" else "")
    admin = Minio(
        server.endpoint.partition("://")[2],
        *server.root,
        http_client=urllib3.PoolManager(ca_certs=str(authority.file)),
    )

    def encryption(name: str) -> str | None:
        return (admin.stat_object(config.bucket, name).metadata or {}).get(
            "x-amz-server-side-encryption"
        )

    tier = open_tier(config)
    tier.describe(NAMESPACE)
    spill(tier, KEYS)
    load(tier, KEYS)
    names = [NAMES.description(NAMESPACE.digest), *map(NAMES.page, KEYS)]
    assert [encryption(name) for name in names] == [told] * 4
    garbage = b"not the page"
    metadata: dict[str, str | list[str] | tuple[str]] = {
        "memkv-format": "1",
        "memkv-length": str(len(garbage) + 1),
        "memkv-checksum": "0" * 32,
    }
    admin.put_object(
        config.bucket,
        NAMES.page(KEYS[0]),
        io.BytesIO(garbage),
        len(garbage),
        metadata=metadata,
    )
    page = make_page(KEYS[0], LENGTHS, filled=False)
    assert tier.load([page], soon()) == [LoadResult.CORRUPT]
    assert encryption(NAMES.quarantine(KEYS[0])) == told


@pytest.mark.parametrize(
    "settings",
    [
        {"minio.sse": "kms"},
        {"minio.sse": "s3", "minio.sse_kms_key": "k"},
        {"minio.sse_kms_key": "k"},
        {"minio.sse": "kms", "minio.sse_kms_key": "a b"},
        {"minio.sse": "kms", "minio.sse_kms_key": "k", "minio.endpoint": "http://minio:9000"},
    ],
)
def test_settings_that_cannot_work_are_rejected(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="minio-sse"):
        load_config(None, {}, settings)
