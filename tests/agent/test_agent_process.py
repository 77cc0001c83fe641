"""The agent process: start, health, signals, stop."""

import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.config.schema import AgentConfig, Config
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.agent.agent_harness import (
    LIMIT,
    NAMESPACE,
    HostPool,
    RawClient,
    RunningAgent,
    connected_client,
    environment,
    eventually,
    make_config,
    running_agent,
)


def http_port(agent: RunningAgent) -> int:
    with RawClient(agent.socket) as raw:
        raw.greet()
        report = raw.ask(protocol.Status())
        assert isinstance(report, protocol.StatusReport)
        return report.agent.http_port


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=LIMIT) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def start_in_vain(config: Config) -> tuple[int, str]:
    return RunningAgent(config, environment()).wait()


def test_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    """A large disk needs more open files than the usual limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with running_agent(make_config(tmp_path)) as agent:
            assert resource.prlimit(agent.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_socket_is_private(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path)) as agent:
        assert stat.S_IMODE(agent.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(agent.socket.parent.stat().st_mode) == 0o700
        assert serving_peer(agent.socket) == (agent.pid, os.getuid())


def test_health_readiness_and_metrics(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent, HostPool(3) as pool, connected_client(config) as client:
        number = client.register_pool(pool.descriptor, pool.length)
        chain = make_chain(NAMESPACE, 3)
        client.spill(chain, pool.buffers(number, range(3)))
        client.load(chain, pool.buffers(number, range(3)))
        port = http_port(agent)
        assert get(port, "/healthz") == (200, "ok\n")
        eventually(lambda: get(port, "/readyz") == (200, "ready\n"))
        assert get(port, "/elsewhere")[0] == 404
        status, metrics = get(port, "/metrics")
        assert status == 200
        assert 'memkv_tier_pages{tier="memory"} 3.0' in metrics
        assert re.search(r"memkv_pages_total\{.*load.*loaded.*\} 3\.0", metrics)
        assert "process_resident_memory_bytes" in metrics
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as rude:
            rude.sendall(b"\xff" * 20_000)
        assert get(port, "/healthz") == (200, "ok\n")


def test_sigterm_ends_the_call_in_flight_and_removes_the_socket(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    chain = make_chain(NAMESPACE, 2)
    with (
        running_agent(config, "0.4", calls=tmp_path / "calls") as agent,
        HostPool(2) as pool,
        connected_client(config) as client,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        pool.fill(chain)
        client.spill(chain, pool.buffers(number, range(2)))
        pool.wipe()
        loads: list[PageLoad] = []
        load = threading.Thread(
            target=lambda: loads.extend(client.load(chain, pool.buffers(number, range(2))))
        )
        load.start()
        eventually((tmp_path / "calls").exists)
        status, log = agent.terminate()
        load.join()
        assert [result for result, _ in loads] == [LoadResult.LOADED] * 2
        assert pool.holds(chain)
        assert status == 0
        assert list(agent.socket.parent.iterdir()) == []
        assert all(re.match(r'time=\S+ level=\w+ .*event="?\w', line) for line in log.splitlines())


@pytest.mark.parametrize("disturbance", ["none", "signal again", "clear in flight"])
def test_sigterm_drains_the_upload_queue(tmp_path: Path, disturbance: str) -> None:
    config, uploads = make_config(tmp_path, drain_timeout=20.0), tmp_path / "uploads"
    chains = [make_chain(NAMESPACE, 2, str(number)) for number in range(8)]
    with (
        running_agent(config, "never clear", uploads) as agent,
        HostPool(2) as pool,
        RawClient(agent.socket) as other,
    ):
        other.greet()
        if disturbance == "clear in flight":
            other.send(protocol.Clear(make_namespace(model="another").digest))
        with connected_client(config) as client:
            buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(2))
            for chain in chains:
                pool.fill(chain)
                assert client.spill(chain, buffers) == [SpillResult.STORED] * 2
        agent.process.send_signal(signal.SIGTERM)
        if disturbance == "signal again":
            eventually(lambda: refused_as_ending(agent))
            agent.process.send_signal(signal.SIGTERM)
        status, _ = agent.wait()
        assert status == 0
        spilled = {page_hash.hex() for chain in chains for page_hash in chain.hashes}
        assert set(uploads.read_text().split()) == spilled


def test_new_clients_are_refused_while_the_agent_stops(tmp_path: Path) -> None:
    config, calls = make_config(tmp_path), tmp_path / "calls"
    with running_agent(config, "0.7", calls=calls) as agent, RawClient(agent.socket) as raw:
        raw.greet()
        raw.send(protocol.LookupPages(NAMESPACE.digest, bytes(32), 1.0))
        eventually(calls.exists)
        agent.process.send_signal(signal.SIGTERM)
        eventually(lambda: refused_as_ending(agent))
        assert isinstance(raw.receive(), protocol.FoundPages)
        assert agent.wait()[0] == 0


def test_second_signal_stops_immediately(tmp_path: Path) -> None:
    config, calls = make_config(tmp_path), tmp_path / "calls"
    with running_agent(config, "30", calls=calls) as agent, RawClient(agent.socket) as raw:
        raw.greet()
        raw.send(protocol.LookupPages(NAMESPACE.digest, bytes(32), 1.0))
        eventually(calls.exists)
        agent.process.send_signal(signal.SIGINT)
        eventually(lambda: refused_as_ending(agent))

        def ended() -> bool:
            agent.process.send_signal(signal.SIGINT)
            return agent.process.poll() is not None

        eventually(ended)
        assert agent.wait()[0] == 1
        assert not agent.socket.exists()


def test_not_ready_before_the_tiers_have_answered(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path), "3") as agent:
        port = http_port(agent)
        assert get(port, "/readyz") == (503, "not ready\n")
        eventually(lambda: get(port, "/readyz") == (200, "ready\n"))


def refused_as_ending(agent: RunningAgent) -> bool:
    with RawClient(agent.socket) as late:
        reply = late.ask(protocol.Hello(protocol.PROTOCOL_VERSION))
        return reply == protocol.Refused("the agent is stopping")


def test_client_can_stop_the_agent(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent, connected_client(config) as client:
        assert client.shutdown()
        assert agent.wait()[0] == 0


def test_second_agent_fails_without_disturbing_the_first(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent:
        status, log = start_in_vain(config)
        assert status == 2
        assert f"another agent (pid {agent.pid}) serves {agent.socket}" in log
        assert len(log.splitlines()) == 1
        assert serving_peer(agent.socket) is not None


def test_agent_replaces_a_killed_one(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent:
        agent.terminate(signal.SIGKILL)
        assert agent.socket.exists()
    with running_agent(config) as successor:
        http_port(successor)
        assert successor.terminate()[0] == 0


def test_failed_start_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, log = start_in_vain(make_config(tmp_path, http_port=port))
    assert (status, len(log.splitlines())) == (2, 1)
    problem = f"agent.http_address, agent.http_port: cannot listen on 127.0.0.1:{port}"
    assert log.startswith(f"error: {problem}")
    status, log = start_in_vain(make_config(tmp_path / ("d" * 100)))
    assert (status, len(log.splitlines())) == (2, 1)
    assert log.startswith("error: agent.socket: ")
    assert list((tmp_path / "run").iterdir()) == []


def test_agent_without_tiers_names_the_settings(tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, msgspec\n"
            "from memkv_sglang.agent.main import run\n"
            "from memkv_sglang.config.schema import Config\n"
            "sys.exit(run(msgspec.json.decode(sys.stdin.read(), type=Config)))",
        ],
        input=msgspec.json.encode(make_config(tmp_path)),
        capture_output=True,
        timeout=LIMIT,
    )
    assert process.returncode == 2
    assert process.stderr.startswith(b"error: nvme.directory, minio.endpoint: ")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("ConfigError('nvme.directory: problem')", 2),
        ("BrokenDiskError('nvme.directory: problem')", 1),
        ("TierError('problem')", 1),
        ("OSError('problem')", 1),
    ],
)
def test_exit_status_is_2_only_for_a_wrong_configuration(
    tmp_path: Path, error: str, expected: int
) -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, msgspec\n"
            "from memkv_sglang.agent.main import run\n"
            "from memkv_sglang.config.errors import BrokenDiskError, ConfigError\n"
            "from memkv_sglang.config.schema import Config\n"
            "from memkv_sglang.tiers.base import TierError\n"
            "def build(*_):\n"
            f"    raise {error}\n"
            "sys.exit(run(msgspec.json.decode(sys.stdin.read(), type=Config), build=build))",
        ],
        input=msgspec.json.encode(make_config(tmp_path)),
        capture_output=True,
        timeout=LIMIT,
    )
    assert process.returncode == expected
    (line,) = process.stderr.splitlines()
    assert line.startswith(b"error: ")
    assert line.endswith(b"problem")


def test_an_agent_started_by_hand_stays_when_it_is_idle(tmp_path: Path) -> None:
    config = make_config(tmp_path, idle_timeout=0.2)
    with running_agent(config) as agent:
        with RawClient(agent.socket) as raw:
            raw.greet()
        time.sleep(1.0)
        assert serving_peer(agent.socket) == (agent.pid, os.getuid())


def test_unconfigured_tiers_are_not_imported() -> None:
    script = (
        "import sys, memkv_sglang.agent.main, memkv_sglang.client.client\n"
        "print(*(n for n in ('minio', 'torch', 'sglang', 'numpy') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=LIMIT)
    assert done.stdout.strip() == b"", done.stderr


def test_log_level_applies(tmp_path: Path) -> None:
    config = Config(
        agent=AgentConfig(socket=str(tmp_path / "run" / "agent.sock"), log_level="error")
    )
    with running_agent(config) as agent:
        assert agent.terminate() == (0, "")
