"""Storages made as SGLang makes them, but without a server: real host pools, agents and MinIO."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from memkv_sglang.config.schema import MinioConfig
from tests.plugin.attached import Node, prepare_process

MakeNode = Callable[..., Node]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="memkv-") as directory:
        yield Path(directory)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look like a server's scheduler."""
    prepare_process(monkeypatch)


@pytest.fixture
def make_node(
    home: Path, minio_config: MinioConfig, process: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeNode]:
    """Make nodes that share a bucket; each has its own agent and directory."""
    with ExitStack() as stack:

        def make(name: str = "a", minio: MinioConfig | None = minio_config, **kinds: Any) -> Node:
            if minio is not None:
                monkeypatch.setenv("MEMKV_MINIO_ACCESS_KEY", minio.access_key)
                monkeypatch.setenv("MEMKV_MINIO_SECRET_KEY", minio.secret_key)
            node = Node(home / name, minio, **kinds)
            stack.callback(node.close)
            return node

        yield make
