"""Fixtures: a node's settings as variables, and an agent."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_sglang.cli.main import main
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import MinioConfig
from tests.cli.cli_node import Outcome, Run, running_agent


@pytest.fixture
def environ(tmp_path: Path, minio_config: MinioConfig) -> dict[str, str]:
    """Return variables that configure both tiers. Neither directory nor bucket exists yet."""
    (tmp_path / "run").mkdir(mode=0o700)
    return {
        "MEMKV_CONFIG": "",
        "MEMKV_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock"),
        "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
        "MEMKV_NVME_CAPACITY": "64MiB",
        "MEMKV_NVME_SEGMENT_SIZE": "8MiB",
        "MEMKV_MINIO_ENDPOINT": minio_config.endpoint,
        "MEMKV_MINIO_BUCKET": minio_config.bucket,
        "MEMKV_MINIO_ACCESS_KEY": minio_config.access_key,
        "MEMKV_MINIO_SECRET_KEY": minio_config.secret_key,
        "MEMKV_COLLECTOR_INTERVAL": "1s",
    }


@pytest.fixture
def run(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Return a function that runs a command in this process with only these `MEMKV_*` variables."""
    for name in [name for name in os.environ if name.startswith("MEMKV_")]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # Make the output independent of the terminal.
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str, **variables: str) -> Outcome:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            status = main(arguments)
        return Outcome(status, *capfd.readouterr())

    return call


@pytest.fixture
def agent(environ: dict[str, str]) -> Iterator[AgentClient]:
    with running_agent(environ) as client:
        yield client
