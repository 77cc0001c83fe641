"""Agent and servers in separate containers: who kills the agent, and who owns the buffers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agent.agent_harness import LIMIT, alive, environment, eventually, maps
from tests.deploy.pods import PAGES, pod

LOADED, FAILED = ["LOADED"] * PAGES, ["FAILED"] * PAGES
HUNG = 1.5
"""Seconds after which the servers of these tests give up on a load."""


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "run" / "agent.sock"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_server_uses_an_agent_in_another_container(socket: Path) -> None:
    with pod("agent", socket) as agent, pod("server", socket) as server:
        assert server.ask("connect") == ""
        assert server.ask("spill") == ["STORED"] * PAGES
        assert server.ask("load") == LOADED
        assert server.ask("holds")
        assert agent.stop() == 0
        assert not list(socket.parent.iterdir())


def test_hung_agent_is_killed_by_its_supervisor(socket: Path) -> None:
    """The hung agent writes to the pages forever. Once the load has returned, nothing writes to
    them.
    """
    with (
        pod("agent", socket, behaviour="scribble") as agent,
        pod("server", socket, str(HUNG)) as server,
    ):
        assert server.ask("connect") == ""
        assert server.ask("spill") == ["STORED"] * PAGES
        hung = children(agent.init())
        assert server.ask("load") == FAILED
        assert not server.ask("withholding")
        server.ask("overwrite")
        eventually(lambda: children(agent.init()) not in ([], hung))  # a new agent has started
        assert server.ask("connect") == ""
        assert server.ask("spill") == ["STORED"] * PAGES
        server.ask("overwrite")
        assert server.ask("overwritten")


def test_other_servers_outlive_a_server_that_dies_during_a_load(socket: Path) -> None:
    with pod("agent", socket, behaviour="0.5") as agent, pod("server", socket) as survivor:
        assert survivor.ask("connect") == ""
        assert survivor.ask("spill") == ["STORED"] * PAGES
        (pid,) = children(agent.init())
        with pod("server", socket) as victim:
            assert victim.ask("connect") == ""
            victim.send("load")
            time.sleep(0.2)  # by now the load has begun, although it may not have reached the tier
        assert survivor.ask("load") == LOADED
        assert survivor.ask("holds")
        assert children(agent.init()) == [pid]
        # The victim's pool is unmapped once its load has ended; the survivor's stays.
        eventually(lambda: Path(f"/proc/{pid}/maps").read_text().count("/memfd:pool ") == 1)
        assert maps(pid, "pool")


def test_replaced_agent_is_found_again(socket: Path) -> None:
    with pod("server", socket) as server:
        with pod("agent", socket, behaviour="scribble") as agent:
            assert server.ask("connect") == ""
            assert server.ask("spill") == ["STORED"] * PAGES
            server.send("load")
            time.sleep(0.3)
            begin = time.monotonic()
            agent.kill()
            assert server.answer() == FAILED  # arrives long before the server's own timeout
            assert time.monotonic() - begin < LIMIT / 2
            assert not server.ask("withholding")
            server.ask("overwrite")
        with pod("agent", socket):
            assert server.ask("connect") == ""
            assert server.ask("overwritten")
            assert server.ask("spill") == ["STORED"] * PAGES
            assert server.ask("load") == LOADED
            assert server.ask("holds")


@pytest.mark.slow
def test_agent_without_a_supervisor_is_not_used(socket: Path) -> None:
    with pod("agent", socket, "--alone"), pod("server", socket) as server:
        eventually(lambda: "memkv agent --supervise" in server.ask("problem"))
        assert server.ask("load") == FAILED


@pytest.mark.slow
def test_request_about_another_agent_kills_nothing(socket: Path) -> None:
    """A request may arrive after its agent was replaced."""
    with pod("agent", socket) as agent, pod("server", socket) as server:
        assert server.ask("connect") == ""
        before = children(agent.init())
        assert not server.ask("kill_other_agent")
        assert server.ask("spill") == ["STORED"] * PAGES
        assert children(agent.init()) == before


def test_agent_ends_with_its_supervisor(socket: Path) -> None:
    """Here the supervisor is not the init of a pid namespace, which would end with it."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.deploy.pods", "agent", str(socket)],
        env={**os.environ, **environment()},
    )
    try:
        eventually(lambda: socket.exists())
        (agent,) = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        eventually(lambda: not alive(agent))
    finally:
        process.kill()
        process.wait()
