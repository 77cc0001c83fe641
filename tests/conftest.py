"""Fixtures that more than one folder of tests uses."""

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config import load
from memkv_sglang.config.schema import MinioConfig

# No test depends on timing, and a machine may be busy.
settings.register_profile("memkv", deadline=None)
settings.load_profile("memkv")

# Neither this process nor those it starts read this machine's configuration files.
os.environ["MEMKV_CONFIG"] = ""
load.SYSTEM_FILE = Path("/nonexistent/memkv/config.toml")

# A script's background job, and all it starts, ignores Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def minio_server() -> Iterator[MinioServer]:
    """A real MinIO for the whole run; tests that stop or kill a server start their own."""
    with MinioServer() as server:
        yield server


@pytest.fixture
def minio_config(minio_server: MinioServer) -> MinioConfig:
    """Settings for a bucket of the test's own, which does not exist yet."""
    return MinioConfig(
        endpoint=minio_server.endpoint,
        bucket=f"test-{uuid.uuid4().hex}",
        access_key=minio_server.access_key,
        secret_key=minio_server.secret_key,
    )
