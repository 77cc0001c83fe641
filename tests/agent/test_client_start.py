"""Starting an agent: one for all clients, independent of its starter, with clear errors."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from memkv_testbed.processes import suspend

from memkv_sglang.agent import launch
from memkv_sglang.agent.launch import StartError, start_agent
from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.agent.log_file import LOG_LIMIT
from memkv_sglang.agent.placement import SET_MEMPOLICY
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import Config, MinioConfig, NvmeConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.agent.agent_harness import (
    LIMIT,
    MODULE,
    NAMESPACE,
    HostPool,
    alive,
    entries,
    environment,
    eventually,
    make_config,
    maps,
)
from tests.tiers.nvme.nvme_support import capacity_for

CHAIN = make_chain(NAMESPACE, 2)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """Settings for agents that `start_agent` starts; the agent that serves at the end is killed."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config = make_config(tmp_path)
    yield config
    peer = serving_peer(Path(config.agent.socket))
    if peer is not None:
        os.kill(peer.pid, signal.SIGKILL)
        eventually(lambda: not alive(peer.pid))


def pid_of(client: AgentClient) -> int:
    report = client.status()
    assert report is not None
    return report.agent.pid


RACER = """
import sys
from tests.agent.agent_harness import *
client = AgentClient(make_config(Path(sys.argv[1])), start=True, module=MODULE)
sys.stdin.read(1)
print(client.wait(LIMIT) and client.status().agent.pid)
"""


def test_sixteen_processes_start_one_agent(config: Config, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(16)
    ]
    pids = {racer.communicate(b"x", timeout=60)[0] for racer in racers}
    assert len(pids) == 1
    pid = int(pids.pop())
    log = Path(config.agent.socket).with_name("agent.log").read_text()
    assert log.count('event="agent ready"') == 1
    assert alive(pid), "the agent outlives those who started it"


def test_started_agent_outlives_its_starter(config: Config) -> None:
    assert start_agent(config, MODULE)
    assert not start_agent(config, MODULE)
    peer = serving_peer(Path(config.agent.socket))
    assert peer is not None
    fields = Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()
    parent, session = int(fields[1]), int(fields[3])
    assert parent != os.getpid()
    assert session not in (os.getsid(0), peer.pid)
    open_files = {}
    for link in Path(f"/proc/{peer.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # the agent may close a connection meanwhile
            open_files[int(link.name)] = link.readlink()
    log = Path(config.agent.socket).with_name("agent.log")
    assert [open_files[number] for number in range(3)] == [Path(os.devnull), log, log]
    assert log.parent not in open_files.values(), "the lock is still held"


def test_an_idle_agent_ends(config: Config, tmp_path: Path) -> None:
    config = make_config(tmp_path, idle_timeout=0.3)
    client = AgentClient(config, start=True, module=MODULE)
    assert client.wait(LIMIT), client.problem
    pid = pid_of(client)
    time.sleep(0.8)  # an agent with an idle client does not exit
    assert alive(pid)
    client.close()
    eventually(lambda: not alive(pid))
    assert 'event="agent idle"' in Path(config.agent.socket).with_name("agent.log").read_text()


CONFINED = """
import ctypes, os, sys, time
from tests.agent.agent_harness import *
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
node = ctypes.c_ulong(1)
assert ctypes.CDLL(None).syscall(int(sys.argv[2]), 2, ctypes.byref(node), 64) == 0  # MPOL_BIND
client = AgentClient(make_config(Path(sys.argv[1])), start=True, module=MODULE)
print(client.wait(LIMIT) and client.status().agent.pid, flush=True)
time.sleep(LIMIT)
"""


def test_an_agent_uses_the_whole_machine_and_not_its_starters_part_of_it(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang binds each rank to a NUMA node, and its environment names the rank's GPU."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "LD_PRELOAD"):
        monkeypatch.setenv(name, "" if name == "LD_PRELOAD" else "1")
    call = SET_MEMPOLICY.get(platform.machine())
    if call is None:
        pytest.skip("no number of set_mempolicy for this machine")
    command = [sys.executable, "-c", CONFINED, str(tmp_path), str(call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.kill()
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)
    policies = Path(f"/proc/{pid}/numa_maps").read_text().splitlines()
    assert {line.split()[1] for line in policies} == {"default"}
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    names = {entry.partition(b"=")[0] for entry in variables}
    assert names.isdisjoint({b"CUDA_VISIBLE_DEVICES", b"OMP_NUM_THREADS", b"LD_PRELOAD"})
    assert b"PYTHONPATH" in names


def descendants(pid: int) -> list[int]:
    """Return the ids of a process's descendants."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for line in lists for child in line.split()]
    return children + [pid for child in children for pid in descendants(child)]


def test_an_agent_survives_a_starter_that_kills_all_its_descendants(
    config: Config, tmp_path: Path
) -> None:
    """SGLang does that when it ends. Other servers of the node keep their agent."""
    command = [sys.executable, "-c", CONFINED.replace("assert ctypes", "# "), str(tmp_path), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        other = AgentClient(config, start=True, module=MODULE)
        try:
            assert other.wait(LIMIT), other.problem
            for child in descendants(starter.pid):
                os.kill(child, signal.SIGKILL)
            starter.kill()
            starter.wait()
            assert pid_of(other) == pid
        finally:
            other.close()


@pytest.mark.parametrize("size", [LOG_LIMIT, LOG_LIMIT + 1])
def test_long_log_is_rotated(config: Config, size: int) -> None:
    log = Path(config.agent.socket).with_name("agent.log")
    log.parent.mkdir(mode=0o700)
    with log.open("wb") as file:
        file.truncate(size)
    assert start_agent(config, MODULE)
    assert log.with_name("agent.log.1").exists() == (size > LOG_LIMIT)
    assert (log.stat().st_size < LOG_LIMIT) == (size > LOG_LIMIT)


def test_agent_does_not_write_to_a_servers_metrics_directory(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    start_agent(config, MODULE)
    peer = serving_peer(Path(config.agent.socket))
    assert peer is not None
    assert b"PROMETHEUS_MULTIPROC_DIR" not in Path(f"/proc/{peer.pid}/environ").read_bytes()


def test_arguments_contain_no_secrets(config: Config) -> None:
    secret = "s3cr3t-key"
    start_agent(Config(agent=config.agent, minio=MinioConfig(secret_key=secret)), MODULE)
    peer = serving_peer(Path(config.agent.socket))
    assert peer is not None
    assert secret not in Path(f"/proc/{peer.pid}/cmdline").read_text()
    assert secret not in Path(f"/proc/{peer.pid}/environ").read_text()
    assert secret not in Path(config.agent.socket).with_name("agent.log").read_text()


def test_client_reports_why_the_agent_did_not_start(config: Config) -> None:
    client = AgentClient(config, start=True)
    try:
        eventually(lambda: client.problem.startswith("nvme.directory, minio.endpoint: both are"))
    finally:
        client.close()


def test_silently_failing_agent_is_reported(config: Config) -> None:
    with pytest.raises(StartError, match=r"before it was ready; see .*agent\.log"):
        start_agent(config, "no_such_module")


def test_agent_that_never_becomes_ready_is_killed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(
        f"import os, pathlib, time\n"
        f"if os.fork(): os._exit(0)\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n"
        f"time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "START_LIMIT", 1.0)
    with pytest.raises(StartError, match="not ready after"):
        start_agent(config, "sleeper")
    eventually(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_dead_agent_is_restarted(config: Config, number: int) -> None:
    client = AgentClient(config, start=True, module=MODULE)
    with HostPool(2) as pool:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(2))
        assert client.wait(LIMIT), client.problem
        first = pid_of(client)
        os.kill(first, number)
        eventually(lambda: not alive(first))
        eventually(lambda: client.problem == "" and client.status() is not None)
        assert pid_of(client) != first
        assert client.spill(CHAIN, buffers) == [SpillResult.STORED] * 2
    client.close()


def test_stalled_agent_is_replaced(config: Config) -> None:
    client = AgentClient(config, start=True, module=MODULE, limit=0.5)
    with HostPool(2) as pool:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(2))
        assert client.wait(LIMIT), client.problem
        stalled = pid_of(client)
        suspend(stalled)
        loads = client.load(CHAIN, buffers)
        assert [load.result for load in loads] == [LoadResult.FAILED] * 2
        assert not alive(stalled)
        eventually(lambda: client.problem == "" and client.status() is not None)
        assert client.spill(CHAIN, buffers) == [SpillResult.STORED] * 2
    client.close()


def test_starting_an_agent_leaks_nothing(config: Config) -> None:
    before, children = entries("/proc/self/fd"), own_children()
    assert start_agent(config, MODULE)
    assert entries("/proc/self/fd") == before
    assert own_children() == children


def own_children() -> set[str]:
    """Return this process's children."""
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for children in lists for pid in children.read_text().split()}


def test_pages_on_disk_survive_a_killed_agent(config: Config, tmp_path: Path) -> None:
    config = Config(
        agent=config.agent,
        nvme=NvmeConfig(directory=str(tmp_path / "pages"), capacity=64 << 20),
    )
    client = AgentClient(config, start=True)
    with HostPool(2, "on-disk") as pool:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(2))
        assert client.wait(LIMIT), client.problem
        pool.fill(CHAIN)
        assert client.spill(CHAIN, buffers) == [SpillResult.STORED] * 2
        first = pid_of(client)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not alive(first))
        eventually(lambda: client.problem == "" and client.status() is not None)
        pool.wipe()
        assert client.lookup(CHAIN).length == 2
        loads = client.load(CHAIN, buffers)
        assert [(load.result, load.tier) for load in loads] == [(LoadResult.LOADED, "nvme")] * 2
        assert pool.holds(CHAIN)
        last = pid_of(client)
        assert maps(last, "on-disk")
        client.release_pool(0)
        eventually(lambda: not maps(last, "on-disk"))
    assert client.shutdown()
    client.close()
    eventually(lambda: not alive(last))


def test_pages_spilled_in_several_calls_are_evicted_leaf_first(
    config: Config, tmp_path: Path
) -> None:
    """Evicting a chain's beginning first would make its other pages unusable."""
    config = Config(
        agent=config.agent,
        nvme=NvmeConfig(
            directory=str(tmp_path / "pages"),
            capacity=capacity_for(96),
            high_watermark=1.0,
        ),
    )
    old, new = make_chain(NAMESPACE, 72, "old"), make_chain(NAMESPACE, 60, "new")
    client = AgentClient(config, start=True)
    with HostPool(12) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        assert client.wait(LIMIT), client.problem
        for chain in (old, new):
            for begin in range(0, len(chain.hashes), 12):
                part = Chain(chain.namespace, chain.hashes[begin : begin + 12])
                pool.fill(part)
                stored = client.spill(part, pool.buffers(number, range(12)), chain.hashes[:begin])
                assert stored == [SpillResult.STORED] * 12
    assert client.present(old) == [True] * 36 + [False] * 36
    assert client.lookup(old).length == 36
    assert client.lookup(new).length == 60
    agent = pid_of(client)
    assert client.shutdown()
    client.close()
    eventually(lambda: not alive(agent))
