"""Real servers of a patched SGLang, with the plugin left out."""

import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang_cpu_platform import tiny_model
from sglang_cpu_platform.server import CpuServer

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config
from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.plugin.flags import FLAGS
from memkv_sglang.testing.minio_server import MinioServer
from tests.patching.patched_copy import environment_of, make_patched_copy

PAGE = 64
PROMPT = random.Random(11).choices(range(5, 261), k=1500)
REUSED = (len(PROMPT) - 1) // PAGE * PAGE


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="memkv-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def patched(home: Path) -> dict[str, str]:
    return environment_of(make_patched_copy(home / "sglang"))


class Node:
    """A server on a patched SGLang and the agent that it starts."""

    def __init__(self, home: Path, minio: MinioConfig, sglang: dict[str, str], *ask: str) -> None:
        environment = {
            "MEMKV_MINIO_ACCESS_KEY": minio.access_key,
            "MEMKV_MINIO_SECRET_KEY": minio.secret_key,
            "MEMKV_AGENT_SOCKET": str(home / "run" / "agent.sock"),
            "MEMKV_AGENT_IDLE_EXIT": "60",
        }
        flags = {
            "--memkv-endpoint": minio.endpoint,
            "--memkv-bucket": minio.bucket,
            "--memkv-nvme-dir": str(home / "pages"),
            "--memkv-nvme-capacity": str(256 * MIB),
        }
        self.server = CpuServer(
            home.parent / "model",
            log=home / "log",
            page_size=PAGE,
            max_total_tokens=8192,
            extra=[*ask, *(word for flag in flags.items() for word in flag)],
            env={**environment, **sglang},
        )
        settings = zip((flag.key for flag in FLAGS), flags.values(), strict=False)
        self._config = load_config(None, environment, dict(settings))

    def share(self) -> None:
        """Return when all that was computed is in MinIO; the server's own pools are empty then."""
        self.server.client.flush_cache()
        client = AgentClient(self._config, start=False)
        try:
            assert client.wait(5.0), self.server.log_tail()
            assert client.flush(60.0)
        finally:
            client.close()

    def close(self) -> None:
        self.server.stop()
        with suppress(OSError):
            client = AgentClient(self._config, start=False)
            if client.wait(5.0):
                client.shutdown()
            client.close()


def test_the_backend_and_the_flag_share_pages(
    home: Path, patched: dict[str, str], minio_server: MinioServer, minio_config: MinioConfig
) -> None:
    tiny_model.make(home / "model", "mha")
    by_name = Node(home / "a", minio_config, patched, "--hicache-storage-backend", "memkv")
    by_flag = Node(home / "b", minio_config, patched, "--enable-memkv")
    with ExitStack() as stack:
        for node in (by_name, by_flag):
            stack.callback(node.close)
            node.server.start()
        for node in (by_name, by_flag):
            node.server.wait_ready()
        computed = by_name.server.client.generate(PROMPT)
        by_name.share()
        reused = by_flag.server.client.generate(PROMPT)
        info = by_flag.server.client.get("/server_info")
    assert computed.cached_tokens == 0
    assert reused.cached_by_source == {"device": 0, "host": 0, "storage": REUSED}
    assert reused.output_ids == computed.output_ids
    assert info["hicache_storage_backend"] == "memkv"
    assert info["enable_memkv"] is True
