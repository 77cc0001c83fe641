"""Fixtures shared by several cases."""

import pytest
from memkv_testbed.minio_server import MinioServer
from minio import Minio


@pytest.fixture
def admin(minio_server: MinioServer) -> Minio:
    """Return a client with full access to every bucket."""
    root = minio_server.root
    return Minio(
        minio_server.endpoint.removeprefix("http://"),
        access_key=root.access_key,
        secret_key=root.secret_key,
        secure=False,
    )


@pytest.fixture(autouse=True)
def _few_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give new buckets few shards, which saves most requests of a small collection."""
    monkeypatch.setattr("memkv_sglang.tiers.minio.retention.bucket_format.SHARDS", 4)
