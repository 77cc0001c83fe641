"""The Compose file, read by Docker Compose. Needs no Docker daemon.

Needs `docker compose`, or `docker-compose` in PATH or in `~/.cache/sglang-memkv/bin`
(`go install github.com/docker/compose/v2/cmd@latest`, renamed).
"""

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.config.load import load_config

FOLDER = Path(__file__).parents[2] / "deploy" / "compose"

_CACHED = Path.home() / ".cache" / "sglang-memkv" / "bin" / "docker-compose"


@cache
def program() -> tuple[str, ...]:
    """Return the words that call Docker Compose; empty if it is not installed."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ("docker", "compose")
    found = shutil.which("docker-compose") or (str(_CACHED) if _CACHED.exists() else "")
    return (found,) if found else ()


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not program(), reason="needs Docker Compose"),
]


def config(variables: Path, environment: str) -> subprocess.CompletedProcess[str]:
    """Resolve the file with the variables of an `.env` file, which is written first."""
    variables.write_text(environment)
    command: list[str | Path] = [
        *program(),
        "--file",
        FOLDER / "compose.yaml",
        "--env-file",
        variables,
    ]
    return subprocess.run(
        [*command, "config", "--format", "json"], capture_output=True, text=True, check=False
    )


EXAMPLE = (FOLDER / "example.env").read_text()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    variables = tmp_path_factory.mktemp("compose") / ".env"
    done = config(variables, EXAMPLE.replace("PASSWORD=\n", "PASSWORD=chosen-password\n"))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_passwords_must_be_chosen(tmp_path: Path) -> None:
    done = config(tmp_path / ".env", EXAMPLE)
    assert done.returncode != 0
    assert "PASSWORD" in done.stderr and "choose one in .env" in done.stderr


def test_mounted_files_exist(services: dict[str, Any]) -> None:
    mounts = [mount for one in services.values() for mount in one.get("volumes", [])]
    files = [Path(mount["source"]) for mount in mounts if mount["type"] == "bind"]
    assert files and all(file.exists() for file in files)


def test_settings_of_the_agent_are_valid(services: dict[str, Any]) -> None:
    agent = services["agent"]
    loaded = load_config(None, {**agent["environment"], "MEMKV_CONFIG": ""}, {})
    assert loaded.minio.endpoint == "http://minio:9000"
    assert agent["read_only"] and agent["cap_drop"] == ["ALL"]


def test_agent_and_servers_share_the_socket(services: dict[str, Any]) -> None:
    for name in ("agent", "server-1", "server-2"):
        targets = {mount["source"]: mount["target"] for mount in services[name]["volumes"]}
        assert targets["socket"] == "/run/memkv"
