"""Agent and client of the last commit with another protocol, against those of this checkout.

`tests/deploy/test_upgrades.py` does the same with the oldest release.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from memkv_sglang.agent.listener import serving_peer
from tests.agent.agent_harness import LIMIT, alive, eventually
from tests.cases.started_agents import ending_agents
from tests.versions import AGENT, ROOT, start, unpack

EARLIER = "1fe6ce9001b542747bea233eb1ed48deac6009f4"
"""The last commit with protocol 4."""

CLIENT = """
import json, time
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.load import load_config

CONNECTING = ("", "no agent yet")
client = AgentClient(load_config(None), start=True)
give_up = time.monotonic() + 30
while not client.wait(0.1) and (client.problem in CONNECTING or "replaces it" in client.problem):
    assert time.monotonic() < give_up, client.problem
report = client.status() if client.wait(0) else None
tiers = [tier.problem for tier in report.engine.tiers] if report else []
print(json.dumps({"problem": client.problem, "tiers": tiers}))
client.close()
"""

pytestmark = pytest.mark.slow


class Seen(NamedTuple):
    """What a client reports."""

    problem: str
    tiers: list[str | None]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the package of `EARLIER`."""
    target = tmp_path_factory.mktemp("earlier")
    try:
        unpack(EARLIER, target)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the history of the repository: {error.stderr.decode()[:200]}")
    return target


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    (tmp_path / "run").mkdir(mode=0o700)
    socket = tmp_path / "run" / "agent.sock"
    with ending_agents(socket):
        yield {
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "MEMKV_CONFIG": "",
            "MEMKV_AGENT_SOCKET": str(socket),
            "MEMKV_NVME_DIRECTORY": str(tmp_path / "nvme"),
            "MEMKV_NVME_CAPACITY": "64MiB",
        }


def ask(root: Path, environ: dict[str, str]) -> Seen:
    """Run a client that acts like a server, until it is connected or knows why it is not."""
    out, _ = start(root, CLIENT, environ).communicate(timeout=2 * LIMIT)
    return Seen(**msgspec.json.decode(out))


def agent_pid(environ: dict[str, str]) -> int:
    peer = serving_peer(Path(environ["MEMKV_AGENT_SOCKET"]))
    return peer.pid if peer else 0


def test_a_newer_server_leaves_an_older_service_alone(
    earlier: Path, environ: dict[str, str]
) -> None:
    agent = start(earlier, AGENT, environ)
    eventually(lambda: agent_pid(environ) == agent.pid)
    seen = ask(ROOT, environ)
    assert "is older" in seen.problem
    assert "started by hand or as a service" in seen.problem
    assert alive(agent.pid)
    agent.terminate()
    assert agent.wait(LIMIT) == 0


def test_a_newer_server_replaces_an_older_servers_agent(
    earlier: Path, environ: dict[str, str]
) -> None:
    assert ask(earlier, environ).problem == ""
    old = agent_pid(environ)
    seen = ask(ROOT, environ)
    assert seen == Seen("", [""]), "it reads the older agent's directory"
    assert not alive(old)
    log = Path(environ["MEMKV_AGENT_SOCKET"]).with_name("agent.log").read_text()
    assert 'event="agent stopped"' in log, "the older agent did not finish its uploads"


def test_an_older_server_leaves_a_newer_agent_alone(earlier: Path, environ: dict[str, str]) -> None:
    assert ask(ROOT, environ).problem == ""
    new = agent_pid(environ)
    seen = ask(earlier, environ)
    assert "is newer" in seen.problem
    assert "install the same sglang-memkv here" in seen.problem
    assert alive(new)
