"""Two MinIO servers, each with half of the pages."""

import uuid
from collections.abc import Iterator

import pytest
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig, ShardConfig


@pytest.fixture(scope="module")
def servers(minio_server: MinioServer) -> Iterator[list[MinioServer]]:
    """The shared server, which stays up, and one of this module's own."""
    with MinioServer() as other:
        yield [minio_server, other]


@pytest.fixture
def sharded_config(servers: list[MinioServer]) -> MinioConfig:
    """Settings for a bucket on each server."""
    return config_of(servers)


def config_of(servers: list[MinioServer], **settings: object) -> MinioConfig:
    shards = tuple(
        ShardConfig(
            name=f"s{number}",
            endpoint=server.endpoint,
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        for number, server in enumerate(servers)
    )
    bucket = f"test-{uuid.uuid4().hex}"
    return MinioConfig(bucket=bucket, shards=shards, **settings)  # type: ignore[arg-type]
