"""Buffer ownership: when a load or spill returns, no thread writes to its buffers."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from memkv_testbed.processes import suspend

from memkv_sglang.client import connection
from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.connection import AgentConnection, AgentRefusedError
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult
from tests.agent.agent_harness import (
    BLOCK,
    LIMIT,
    NAMESPACE,
    PAGE_BYTES,
    HostPool,
    alive,
    connected_client,
    environment,
    eventually,
    make_config,
    running_agent,
)

PAGES = 4
CHAIN = make_chain(NAMESPACE, PAGES)
MISSES = [LoadResult.FAILED] * PAGES
OURS = b"\xa5" * PAGE_BYTES


class Load:
    """A load in a separate thread, into zeroed pages."""

    def __init__(self, client: AgentClient, pool: HostPool) -> None:
        self.pool = pool
        self.loads: list[PageLoad] = []
        self.seconds = 0.0
        number = client.register_pool(pool.descriptor, pool.length)
        self._buffers = pool.buffers(number, range(PAGES))
        client.spill(CHAIN, self._buffers)
        self._client = client
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        begin = time.monotonic()
        self.loads = self._client.load(CHAIN, self._buffers)
        for page in range(PAGES):  # SGLang, too, reuses pages as soon as the call returns
            self.pool.write(page, OURS)
        self.seconds = time.monotonic() - begin

    def wait_until_written(self) -> None:
        """Wait until the agent writes into the pages."""
        eventually(lambda: any(self.pool.memory[:]))

    def assert_missed_and_untouched(self) -> None:
        """Wait for the call to end; bytes written right after it must not change."""
        self._thread.join(LIMIT)
        assert [load.result for load in self.loads] == MISSES
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            assert all(self.pool.read(page) == OURS for page in range(PAGES))


def test_unresponsive_agent_is_killed_at_the_limit(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with (
        running_agent(config, "scribble") as agent,
        connected_client(config, limit=0.6) as client,
        HostPool(PAGES) as pool,
    ):
        load = Load(client, pool)
        load.wait_until_written()
        load.assert_missed_and_untouched()
        assert load.seconds >= 0.6
        assert agent.wait()[0] == -signal.SIGKILL


def test_stopped_agent_is_killed_at_the_limit(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with (
        running_agent(config, "scribble") as agent,
        connected_client(config, limit=0.6) as client,
        HostPool(PAGES) as pool,
    ):
        load = Load(client, pool)
        load.wait_until_written()
        suspend(agent.pid)
        load.assert_missed_and_untouched()
        assert load.seconds >= 0.6
        assert agent.wait()[0] == -signal.SIGKILL


@pytest.mark.parametrize("round_", range(5))
def test_killed_agent_ends_the_load_early(tmp_path: Path, round_: int) -> None:
    config = make_config(tmp_path)
    with (
        running_agent(config, "scribble") as agent,
        connected_client(config) as client,
        HostPool(PAGES) as pool,
    ):
        load = Load(client, pool)
        load.wait_until_written()
        agent.process.kill()
        load.assert_missed_and_untouched()
        assert load.seconds < 7


def test_stopped_agent_is_killed_for_a_spill_too(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with (
        running_agent(config) as agent,
        connected_client(config, limit=0.4) as client,
        HostPool(PAGES) as pool,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        client.lookup(CHAIN)  # leaves a connection whose hello has been answered
        suspend(agent.pid)
        results = client.spill(CHAIN, pool.buffers(number, range(PAGES)))
        assert results == [SpillResult.REFUSED] * PAGES
        assert not alive(agent.pid)


def test_all_clients_of_a_killed_agent_get_their_buffers_back(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with (
        running_agent(config, "scribble") as agent,
        connected_client(config, limit=0.6) as impatient,
        connected_client(config) as patient,
        HostPool(PAGES) as one,
        HostPool(PAGES) as two,
    ):
        loads = [Load(impatient, one), Load(patient, two)]
        for load in loads:
            load.assert_missed_and_untouched()
        assert not alive(agent.pid)
        assert loads[1].seconds < 7


def test_interrupted_load_still_waits_for_the_agent(tmp_path: Path) -> None:
    config = make_config(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with (
        running_agent(config, "scribble") as agent,
        connected_client(config, limit=0.8) as client,
        HostPool(PAGES) as pool,
    ):
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(PAGES))
        client.spill(CHAIN, buffers)
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2, 0.15)
            with pytest.raises(KeyboardInterrupt):
                client.load(CHAIN, buffers)
            assert not alive(agent.pid)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


@contextmanager
def rogue_agent(config_socket: str, manner: str) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).with_name("rogue_agent.py")
    env = {**os.environ, **environment()}
    process = subprocess.Popen([sys.executable, script, config_socket, manner], env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("manner", ["hang_up", "garbage", "half"])
def test_lost_connection_is_no_proof_that_the_agent_stopped_writing(
    tmp_path: Path, manner: str
) -> None:
    config = make_config(tmp_path)
    with (
        rogue_agent(config.agent.socket, manner) as process,
        connected_client(config, limit=0.8) as client,
        HostPool(PAGES) as pool,
    ):
        load = Load(client, pool)
        load.assert_missed_and_untouched()
        assert load.seconds >= 0.7
        assert process.wait(LIMIT) == -signal.SIGKILL


def test_incompletely_sent_request_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SEND_LIMIT", 0.2)
    config, calls = make_config(tmp_path), tmp_path / "calls"
    with (
        running_agent(config, calls=calls) as agent,
        connected_client(config) as client,
        HostPool(1) as pool,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        client.lookup(CHAIN)
        calls.unlink()
        suspend(agent.pid)
        many = Chain(NAMESPACE.digest, [bytes(32)] * 20_000)
        begin = time.monotonic()
        loads = client.load(many, [[Buffer(number, 0, BLOCK)]] * 20_000)
        assert loads == [PageLoad(LoadResult.FAILED)] * 20_000
        assert time.monotonic() - begin < 5
        agent.process.send_signal(signal.SIGCONT)
        assert client.wait(LIMIT)
        assert client.status() is not None
        assert not calls.exists()
        assert not any(pool.memory[:])


def test_slow_lookup_is_abandoned_without_killing_the_agent(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent, connected_client(config) as client:
        client.lookup(CHAIN)
        suspend(agent.pid)
        begin = time.monotonic()
        assert client.lookup(CHAIN, budget=0.1) == Lookup(0, complete=False)
        assert time.monotonic() - begin < 2
        # While the agent does not answer, later calls return at once.
        begin = time.monotonic()
        for _ in range(100):
            client.lookup(CHAIN)
        assert time.monotonic() - begin < 1
        agent.process.send_signal(signal.SIGCONT)
        assert client.wait(LIMIT)
        assert client.lookup(CHAIN) == Lookup(0, complete=True)
        assert alive(agent.pid)


def test_agent_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    script = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1])\n"
        "os.setegid(65534); os.seteuid(65534)\n"
        "s.listen(); s.accept()[0].recv(1)\n"
    )
    path = tmp_path / "agent.sock"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])

    def refused() -> bool:
        try:
            AgentConnection(path, b"", time.monotonic() + 1)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except AgentRefusedError as error:
            return "runs as uid 65534" in str(error)
        return False

    try:
        eventually(refused)
    finally:
        process.kill()
        process.wait()


def test_agent_in_another_pid_namespace_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from memkv_sglang.client.connection import AgentConnection\n"
        "AgentConnection(Path(sys.argv[1]), b'', time.monotonic() + 5)\n"
    )
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if os.getuid() == 0:
        unshare = ["unshare", "--pid", "--fork"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("no pid namespaces to be had here")
    with running_agent(config) as agent:
        done = subprocess.run(
            [*unshare, sys.executable, "-c", script, str(agent.socket)],
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert "in another container without a supervisor" in done.stderr
