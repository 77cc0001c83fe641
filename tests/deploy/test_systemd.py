"""The systemd unit, and what the agent reports to the service manager."""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from memkv_testbed.processes import suspend

from memkv_sglang.agent import paths
from memkv_sglang.agent.paths import socket_path
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import AgentConfig
from tests.agent.agent_harness import (
    LIMIT,
    MODULE,
    RunningAgent,
    environment,
    eventually,
    make_config,
)

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "memkv-agent.service"

PR_SET_MDWE = 65
"""prctl(2), Linux 6.3: deny memory that is both writable and executable, as the unit does."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(LIMIT)
        yield sock


def notify_variables(manager: socket.socket, watchdog: float) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": f"{watchdog * 1e6:.0f}"}


def wait_for(manager: socket.socket, expected: str) -> str:
    """Return the next notification that begins with the text."""
    while True:
        message = manager.recv(4096).decode()
        if message.startswith(expected):
            return message


def test_agent_reports_its_states_to_systemd(tmp_path: Path, manager: socket.socket) -> None:
    config = make_config(tmp_path, drain_timeout=100.0)
    agent = RunningAgent(config, environment() | notify_variables(manager, 0.3))
    try:
        wait_for(manager, "READY=1")
        agent.wait_ready()  # the agent serves clients from now on
        assert "0 clients" in wait_for(manager, "STATUS=")
        for _ in range(3):
            wait_for(manager, "WATCHDOG=1")
        agent.process.send_signal(signal.SIGTERM)
        stopping = wait_for(manager, "STOPPING=1")
        extension = re.search(r"EXTEND_TIMEOUT_USEC=(\d+)", stopping)
        # Stopping includes uploads, which may take that long.
        assert extension and int(extension[1]) > 100e6
        assert agent.wait()[0] == 0
    finally:
        agent.process.kill()


def test_watchdog_notices_a_stopped_agent(tmp_path: Path, manager: socket.socket) -> None:
    agent = RunningAgent(make_config(tmp_path), environment() | notify_variables(manager, 0.3))
    try:
        wait_for(manager, "WATCHDOG=1")
        suspend(agent.pid)
        manager.settimeout(1.0)
        with pytest.raises(TimeoutError):
            while True:  # reads the notifications sent before the agent was stopped
                wait_for(manager, "WATCHDOG=1")
    finally:
        agent.process.kill()
        agent.wait()


def test_agent_that_a_server_started_does_not_report_to_the_servers_unit(
    tmp_path: Path, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (environment() | notify_variables(manager, 0.3)).items():
        monkeypatch.setenv(name, value)
    with AgentClient(make_config(tmp_path), start=True, module=MODULE) as client:
        assert client.wait(LIMIT), client.problem
        status = client.status()
        assert status is not None
        os.kill(status.agent.pid, signal.SIGTERM)
        eventually(lambda: not Path(status.agent.socket).exists())
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_servers_find_the_service_of_their_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "SERVICE_DIRECTORY", tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert socket_path(AgentConfig()) == tmp_path / "agent.sock"
    monkeypatch.setattr(paths, "SERVICE_DIRECTORY", tmp_path / "missing")
    assert socket_path(AgentConfig()) == Path("/run/user/1/memkv/agent.sock")


def test_server_starts_no_agent_next_to_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config = make_config(tmp_path, autostart=False)
    with AgentClient(config, start=True, module=MODULE) as client:
        eventually(lambda: "agent.autostart is off" in client.problem)
        assert not Path(config.agent.socket).exists()
        agent = RunningAgent(config, environment())
        try:
            assert client.wait(LIMIT), client.problem
        finally:
            agent.process.kill()
            agent.wait()


def test_agent_runs_without_writable_executable_memory(tmp_path: Path) -> None:
    """The unit sets `MemoryDenyWriteExecute`, which breaks some extension modules."""

    def deny() -> None:
        assert ctypes.CDLL(None).prctl(PR_SET_MDWE, 1, 0, 0, 0) == 0

    memkv = str(Path(sys.executable).with_name("memkv"))
    command = [memkv, "agent", "--nvme-capacity", "64MiB"]
    process = subprocess.Popen(
        [*command, "--nvme-directory", str(tmp_path / "nvme")],
        env={**os.environ, "MEMKV_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock")},
        stderr=subprocess.PIPE,
        preexec_fn=deny,
    )
    try:
        assert process.stderr is not None
        assert any(b'event="agent ready"' in line for line in process.stderr)
    finally:
        process.terminate()
        _, rest = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, rest


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_unit_is_valid_and_confined(tmp_path: Path) -> None:
    text = UNIT.read_text()
    program = re.search(r"ExecStart=(\S+)", text)
    assert program
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace(program[1], str(Path(sys.executable).with_name("memkv"))))
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=True
    )
    assert not verify.stderr
    # The threshold is in tenths; systemd calls less than 5.0 "OK".
    subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", copy],
        check=True,
        stdout=subprocess.DEVNULL,
    )
