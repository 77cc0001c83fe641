"""How the agent handles clients that make mistakes, misbehave or die."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.agent.calls import EXIT_BROKEN_ENGINE
from memkv_sglang.agent.server import MAX_CONNECTIONS_OF_PROCESS
from memkv_sglang.config.schema import Config
from memkv_sglang.page import Buffer
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.agent.agent_harness import (
    BLOCK,
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


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def agent(config: Config) -> Iterator[RunningAgent]:
    with running_agent(config) as running:
        yield running


def ended(raw: RawClient) -> bool:
    """Return whether the agent closed the connection without another reply."""
    try:
        raw.receive()
    except (EOFError, ConnectionResetError):
        return True
    return False


def test_client_of_another_version_learns_the_agents_version(agent: RunningAgent) -> None:
    with RawClient(agent.socket) as raw:
        assert raw.ask(protocol.Hello(99)) == protocol.Welcome(protocol.PROTOCOL_VERSION)
        assert ended(raw)


@pytest.mark.parametrize("token", [b"x" * 16, b"x" * 65, "text", 7, [[]], {}])
def test_session_of_another_agent_is_refused(agent: RunningAgent, token: object) -> None:
    with RawClient(agent.socket) as raw:
        reply = raw.ask(protocol.Hello(protocol.PROTOCOL_VERSION, token))
        assert reply == protocol.Refused("unknown session")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 64,
        b"\x01\x00\x00\x00\xc1",
        bytes(4),
        b"\x02\x00\x00\x00\x91\x09",  # a request instead of the hello
    ],
)
def test_garbage_closes_only_its_own_connection(agent: RunningAgent, garbage: bytes) -> None:
    with RawClient(agent.socket) as bystander:
        bystander.greet()
        with RawClient(agent.socket) as raw:
            raw.socket.sendall(garbage)
            raw.socket.shutdown(socket.SHUT_WR)
            assert ended(raw)
        with RawClient(agent.socket) as raw:
            raw.greet()
            raw.socket.sendall(garbage[:4] + b"\xc1" * 100)
            raw.socket.shutdown(socket.SHUT_WR)
            assert ended(raw)
        assert isinstance(bystander.ask(protocol.Status()), protocol.StatusReport)


def test_invalid_requests_get_a_reply(agent: RunningAgent) -> None:
    digest, page_hash = NAMESPACE.digest, bytes(32)
    with HostPool(2) as pool, RawClient(agent.socket) as raw:
        raw.greet()
        assert raw.ask(protocol.RegisterPool(0, pool.length), pool.descriptor) == protocol.Done()
        outside = [[Buffer(0, pool.length - BLOCK + 1, BLOCK)]]
        for request in [
            protocol.LoadPages(digest, page_hash, outside),
            protocol.SpillPages(digest, page_hash, outside, b""),
            protocol.LoadPages(digest, page_hash, [[Buffer(1, 0, BLOCK)]]),
            protocol.LoadPages(digest, page_hash * 2, [[Buffer(0, 0, BLOCK)]]),
            protocol.SpillPages(digest, page_hash, [[Buffer(0, 0, BLOCK)]], b"odd"),
            protocol.LookupPages(digest, b"odd", None),
            protocol.LookupPages(digest, page_hash, float("nan")),
            protocol.LookupPages(digest, page_hash, -1.0),
            protocol.LookupPages(digest, page_hash, None, (float("nan"), 1)),
            protocol.CheckPages(digest, page_hash, float("inf"), ""),
            protocol.Flush(float("inf")),
            protocol.Describe(b"{}"),
            protocol.Clear(b"short"),
            protocol.RegisterPool(1, BLOCK),
            protocol.ReleasePool(4),
            protocol.Hello(protocol.PROTOCOL_VERSION),
        ]:
            assert isinstance(raw.ask(request), protocol.Refused), request
        reply = raw.ask(protocol.RegisterPool(1, BLOCK), pool.descriptor, pool.descriptor)
        assert isinstance(reply, protocol.Refused)
        assert pool.memory[:] == bytes(pool.length)
        assert isinstance(raw.ask(protocol.Status()), protocol.StatusReport)


def test_request_with_wrong_types_is_refused_and_the_connection_stays_open(
    agent: RunningAgent,
) -> None:
    with HostPool(1) as pool, RawClient(agent.socket) as raw:
        raw.greet()
        assert raw.ask(protocol.RegisterPool(0, pool.length), pool.descriptor) == protocol.Done()
        misfit = Buffer(0, 0, 4096.0)  # type: ignore[arg-type]  # what the test is about
        request = protocol.SpillPages(NAMESPACE.digest, bytes(32), [[misfit]], b"")
        assert isinstance(raw.ask(request), protocol.Refused)
        assert isinstance(raw.ask(protocol.Status()), protocol.StatusReport)


def test_description_and_digest_agree(agent: RunningAgent) -> None:
    with RawClient(agent.socket) as raw:
        raw.greet()
        reply = raw.ask(protocol.Describe(NAMESPACE.description))
        assert reply == protocol.Described(NAMESPACE.digest)


def test_connections_of_a_session_share_its_pools(agent: RunningAgent) -> None:
    with HostPool(1, "shared") as pool, RawClient(agent.socket) as first:
        token = first.greet()
        first.ask(protocol.RegisterPool(0, pool.length), pool.descriptor)
        with RawClient(agent.socket) as second:
            second.greet(token)
            request = protocol.SpillPages(NAMESPACE.digest, b"s" * 32, [[Buffer(0, 0, 64)]], b"")
            assert second.ask(request) == protocol.SpilledPages(bytes([SpillResult.STORED]))
        with RawClient(agent.socket) as stranger:
            stranger.greet()
            assert isinstance(stranger.ask(request), protocol.Refused)
        assert agent.maps("shared")
    eventually(lambda: not agent.maps("shared"))


def test_released_pool_is_unmapped_after_use(agent: RunningAgent, config: Config) -> None:
    chain = make_chain(NAMESPACE, 8, "released")
    with HostPool(8, "released") as pool, connected_client(config) as client:
        number = client.register_pool(pool.descriptor, pool.length)
        buffers = pool.buffers(number, range(8))
        client.spill(chain, buffers)
        client.load(chain, buffers)
        assert agent.maps("released")
        client.release_pool(number)
        eventually(lambda: not agent.maps("released"))
        assert client.load(chain, buffers)[0].result is LoadResult.FAILED


DYING_CLIENT = """
import sys
from pathlib import Path
from tests.agent.agent_harness import NAMESPACE, HostPool, connected_client, make_config
from memkv_sglang.testing.pages import make_chain

chain = make_chain(NAMESPACE, 4)
with HostPool(4, "dying") as pool, connected_client(make_config(Path(sys.argv[1]))) as client:
    buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(4))
    client.spill(chain, buffers)
    while True:
        client.load(chain, buffers)
"""


def test_killed_client_leaves_nothing_in_the_agent(tmp_path: Path) -> None:
    config, calls = make_config(tmp_path), tmp_path / "calls"
    with running_agent(config, "0.2", calls=calls) as agent:
        descriptors, threads = agent.descriptors(), agent.threads()
        command = [sys.executable, "-c", DYING_CLIENT, str(tmp_path)]
        dying = subprocess.Popen(command, env={**os.environ, **environment()})
        eventually(calls.exists)
        assert agent.maps("dying")
        dying.kill()
        dying.wait()
        eventually(lambda: not agent.maps("dying"))
        eventually(lambda: agent.descriptors() <= descriptors)
        # The engine's thread pool keeps some threads.
        eventually(lambda: agent.threads() <= threads + 2)


def test_many_connections_leak_nothing(agent: RunningAgent) -> None:
    def connect() -> None:
        with RawClient(agent.socket) as raw, HostPool(1) as pool:
            raw.greet()
            raw.ask(protocol.RegisterPool(0, pool.length), pool.descriptor)

    connect()
    with RawClient(agent.socket) as watcher:
        watcher.greet()

        def alone() -> bool:
            report = watcher.ask(protocol.Status())
            assert isinstance(report, protocol.StatusReport)
            return report.agent.connections == report.agent.sessions == 1

        eventually(alone)
        eventually(lambda: agent.threads() <= 3)
        before = agent.descriptors()
        for _ in range(200):
            connect()
        eventually(alone)
        eventually(lambda: agent.descriptors() <= before)
        eventually(lambda: agent.threads() <= 3)


def test_connections_of_a_process_are_limited(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path)) as agent:
        clients = [RawClient(agent.socket) for _ in range(MAX_CONNECTIONS_OF_PROCESS)]
        clients[0].greet()
        clients[-1].greet()
        with RawClient(agent.socket) as late:
            reply = late.receive()
            assert isinstance(reply, protocol.Refused)
            assert f"{MAX_CONNECTIONS_OF_PROCESS} connections" in reply.reason
        clients.pop().close()

        def admitted() -> bool:
            with RawClient(agent.socket) as raw:
                try:
                    raw.greet()
                except (AssertionError, OSError):
                    return False
                return True

        eventually(admitted)
        for client in clients:
            client.close()


def test_engine_that_raises_in_a_load_ends_the_process(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    chain = make_chain(NAMESPACE, 1)
    with (
        running_agent(config, "raise") as agent,
        HostPool(1) as pool,
        connected_client(config) as client,
    ):
        number = client.register_pool(pool.descriptor, pool.length)
        client.spill(chain, pool.buffers(number, [0]))
        loads = client.load(chain, pool.buffers(number, [0]))
        assert [load.result for load in loads] == [LoadResult.FAILED]
        status, log = agent.wait()
        assert status == EXIT_BROKEN_ENGINE
        assert "a defect" in log


def test_connection_of_another_user_is_closed_unread(agent: RunningAgent) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    probe = (
        "import os, socket, sys\n"
        "from memkv_sglang.agent.protocol import PROTOCOL_VERSION, Hello\n"
        "from memkv_sglang.agent.wire import encode_frame\n"
        "os.fchdir(int(sys.argv[1])); os.setegid(65534); os.seteuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect('agent.sock')\n"
        "try:\n"
        "    s.sendall(encode_frame(Hello(PROTOCOL_VERSION)))\n"
        "    sys.exit(len(s.recv(1)))\n"
        "except (BrokenPipeError, ConnectionResetError):\n"
        "    pass\n"
    )
    # File modes are the first defence, the agent's check is the second. Open the first, so that the
    # client meets the second.
    directory = os.open(agent.socket.parent, os.O_RDONLY)
    agent.socket.parent.chmod(0o711)
    agent.socket.chmod(0o666)
    try:
        command = [sys.executable, "-c", probe, str(directory)]
        assert subprocess.run(command, pass_fds=[directory], timeout=20).returncode == 0
    finally:
        agent.socket.chmod(0o600)
        agent.socket.parent.chmod(0o700)
        os.close(directory)


def test_calls_overlap(tmp_path: Path) -> None:
    config, calls = make_config(tmp_path), tmp_path / "calls"
    with running_agent(config, "0.5", calls=calls) as agent:
        raws = [RawClient(agent.socket) for _ in range(8)]
        for raw in raws:
            raw.greet()
            raw.send(protocol.LookupPages(NAMESPACE.digest, bytes(32), 1.0))
        begin = time.monotonic()
        for raw in raws:
            assert raw.receive() == protocol.FoundPages(0, True)
            raw.close()
        assert time.monotonic() - begin < 8 * 0.5 / 2
