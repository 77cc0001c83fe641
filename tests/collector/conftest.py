"""Fixtures with a bucket and its pages."""

from collections.abc import Iterator

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.minio_users import Keys
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin.policy import node_policy
from tests.collector.bucket import Bucketful


@pytest.fixture(scope="session")
def node_keys(minio_server: MinioServer) -> Keys:
    """Keys of a node with exactly the policy in `deploy/`, for every test's bucket."""
    return _keys(minio_server, reader=False)


@pytest.fixture(scope="session")
def reader_keys(minio_server: MinioServer) -> Keys:
    """Keys of a node with read access only."""
    return _keys(minio_server, reader=True)


def _keys(server: MinioServer, *, reader: bool) -> Keys:
    keys = Keys.random()
    server.users.add(keys, node_policy("test-*", reader=reader))
    return keys


@pytest.fixture
def node_config(minio_config: MinioConfig, node_keys: Keys, admin: Minio) -> MinioConfig:
    """Settings of such a node, with a bucket that an administrator created."""
    admin.make_bucket(minio_config.bucket)
    return msgspec.structs.replace(minio_config, **node_keys._asdict())


@pytest.fixture
def reader_config(node_config: MinioConfig, reader_keys: Keys) -> MinioConfig:
    """Settings of a node that reads the same bucket."""
    return msgspec.structs.replace(node_config, role="reader", **reader_keys._asdict())


@pytest.fixture
def admin(minio_server: MinioServer) -> Minio:
    """An administrator's client."""
    return Minio(minio_server.endpoint.partition("://")[2], *minio_server.root, secure=False)


@pytest.fixture
def bucketful(node_config: MinioConfig, admin: Minio) -> Iterator[Bucketful]:
    """A node's tier on an empty bucket."""
    tier = MinioTier(node_config)
    yield Bucketful(node_config, tier, admin)
    tier.close()


@pytest.fixture(autouse=True)
def _few_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give new buckets few shards, which saves most requests of a small collection."""
    monkeypatch.setattr("memkv_sglang.tiers.minio.retention.bucket_format.SHARDS", 4)
