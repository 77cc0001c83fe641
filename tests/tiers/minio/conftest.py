"""Fixtures shared by the tests of the MinIO tier."""

from collections.abc import Callable, Iterator

import pytest
from memkv_testbed.http_proxy import HttpFaultProxy
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio import MinioTier

OpenTier = Callable[[MinioConfig], MinioTier]


@pytest.fixture
def open_tier() -> Iterator[OpenTier]:
    """Open tiers that are closed when the test ends."""
    tiers: list[MinioTier] = []

    def open_one(config: MinioConfig) -> MinioTier:
        tiers.append(MinioTier(config))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


@pytest.fixture
def admin(minio_server: MinioServer) -> Minio:
    """An administrator's client, which bypasses the tier."""
    return Minio(minio_server.endpoint.partition("://")[2], *minio_server.root, secure=False)


@pytest.fixture
def proxy(minio_server: MinioServer) -> Iterator[HttpFaultProxy]:
    """A proxy between the tier and the server that injects faults."""
    with HttpFaultProxy(minio_server.host, minio_server.port) as proxy:
        yield proxy
