"""An agent whose socket was removed becomes reachable again, or exits so that another can start."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_sglang.agent.listener import Listener, serving_peer
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import Config, NvmeConfig
from memkv_sglang.tiers.nvme import NvmeTier
from tests.agent.agent_for_tests import REBIND_LIMIT
from tests.agent.agent_harness import alive, eventually, running_agent
from tests.agent.agent_harness import make_config as agent_config
from tests.cases.started_agents import connected, ending_agents, make_config, server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make agents give up a lost socket soon."""
    monkeypatch.setenv(REBIND_LIMIT, "0.5")


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Config]:
    config = make_config(tmp_path)
    with ending_agents(Path(config.agent.socket)):
        yield config


def remove(path: Path) -> None:
    shutil.rmtree(path.parent)


def rename(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


def unlink(path: Path) -> None:
    path.unlink()


def overwrite(path: Path) -> None:
    path.unlink()
    # Replaces the agent's socket with one that no process serves.
    Listener(path, locked=False).socket.close()


@pytest.mark.parametrize("lose", [remove, rename, unlink, overwrite])
def test_agent_rebinds_a_lost_socket(config: Config, lose: object) -> None:
    path = Path(config.agent.socket)
    with server(config) as client:
        pid = connected(client)
        assert callable(lose)
        lose(path)
        eventually(lambda: (peer := serving_peer(path)) is not None and peer.pid == pid)
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with server(config) as second:
            assert connected(second) == pid
        assert connected(client) == pid
        if lose is remove:
            assert "recreated it" in path.with_name("agent.log").read_text()


def test_agent_keeps_a_socket_whose_mode_changed(config: Config) -> None:
    path = Path(config.agent.socket)
    with server(config) as client:
        pid = connected(client)
        path.chmod(0o700)
        assert client.shutdown()
        client.close()
    eventually(lambda: not alive(pid))
    assert not path.exists()


def test_agent_keeps_a_touched_socket(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "agent.sock", locked=False)
    os.utime(listener.path)
    assert listener.is_in_place()
    listener.close()
    assert not listener.path.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("spoil", ["mode", "owner", "file"])
def test_an_untrusted_directory_stops_the_agent(tmp_path: Path, spoil: str) -> None:
    if spoil == "owner" and os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    config = agent_config(tmp_path)
    with running_agent(config) as agent:
        directory = agent.socket.parent
        shutil.rmtree(directory)
        if spoil == "file":
            directory.write_text("in the way")
        else:
            directory.mkdir(mode=0o777 if spoil == "mode" else 0o700)
            directory.chmod(0o777 if spoil == "mode" else 0o700)
            if spoil == "owner":
                os.chown(directory, 65534, 65534)
        status, log = agent.wait()
    assert status == 0
    assert "socket lost" in log
    assert not agent.socket.exists()


@pytest.mark.usefixtures("quick")
def test_agent_stops_when_another_takes_its_socket(tmp_path: Path) -> None:
    config = agent_config(tmp_path)
    with running_agent(config) as first:
        first.socket.unlink()
        taken = Listener(first.socket, locked=False)
        try:
            status, log = first.wait()
            assert serving_peer(first.socket) == (os.getpid(), os.getuid())
        finally:
            taken.close()
    assert status == 0
    assert f"(pid {os.getpid()}) serves" in log


def test_error_names_the_agent_that_uses_the_directory(config: Config) -> None:
    with server(config) as client:
        pid = connected(client)
        with pytest.raises(ConfigError, match=rf"in use by another agent \(pid {pid}\)"):
            NvmeTier(NvmeConfig(directory=config.nvme.directory, capacity=64 << 20))
        elsewhere = make_config(Path(config.nvme.directory).parent)
        other = Config(
            agent=type(config.agent)(socket=config.agent.socket + "2"), nvme=elsewhere.nvme
        )
        refused = AgentClient(other, start=True)
        eventually(lambda: f"(pid {pid})" in refused.problem)
        refused.close()
