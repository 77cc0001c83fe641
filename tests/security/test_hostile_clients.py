"""Slow, greedy or hostile clients of the agent's socket harm only themselves."""

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from memkv_sglang.agent import protocol, sessions
from memkv_sglang.agent.log import BURST
from memkv_sglang.agent.pools import MAX_POOLS, PoolBudget, Pools, RequestError
from memkv_sglang.agent.server import MAX_CONNECTIONS, MAX_CONNECTIONS_OF_PROCESS
from memkv_sglang.agent.sessions import DESCRIPTION_INTERVAL, MAX_DESCRIPTIONS, Session
from memkv_sglang.agent.wire import HEADER_SIZE, encode_frame
from memkv_sglang.config.schema import Config
from memkv_sglang.page import Buffer
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.agent.agent_harness import (
    BLOCK,
    LIMIT,
    NAMESPACE,
    HostPool,
    RawClient,
    RunningAgent,
    connected_client,
    eventually,
    make_config,
    running_agent,
)

CHAIN = make_chain(NAMESPACE, 8)
MANY = 40
FULL_MESSAGE = 250
"""Descriptors per message; the kernel's limit is 253 (SCM_MAX_FD)."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def agent(config: Config) -> Iterator[RunningAgent]:
    log = io.BytesIO()
    with running_agent(config) as running:
        # It logs a line per broken connection, and would block on a full pipe.
        reading = threading.Thread(target=shutil.copyfileobj, args=[running.process.stderr, log])
        reading.start()
        yield running
        running.process.kill()
        reading.join()


@pytest.fixture
def unharmed(agent: RunningAgent, config: Config) -> Iterator[Callable[[], None]]:
    """A function that checks that a well-behaved client can spill pages and load them again."""
    with HostPool(len(CHAIN.hashes)) as pool, connected_client(config) as client:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(8))
        pool.fill(CHAIN)
        assert set(client.spill(CHAIN, buffers)) <= {SpillResult.STORED, SpillResult.PRESENT}

        def check() -> None:
            pool.wipe()
            assert client.lookup(CHAIN).length == 8
            loads = client.load(CHAIN, buffers)
            assert {load.result for load in loads} == {LoadResult.LOADED}
            assert pool.holds(CHAIN)

        yield check
        check()


def resident(agent: RunningAgent) -> int:
    """Return the agent's private memory in bytes."""
    status = Path(f"/proc/{agent.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def connections(agent: RunningAgent) -> int:
    with RawClient(agent.socket) as raw:
        raw.greet()
        report = raw.ask(protocol.Status())
    assert isinstance(report, protocol.StatusReport)
    return report.agent.connections


def header(length: int) -> bytes:
    return length.to_bytes(HEADER_SIZE, "little")


@pytest.mark.parametrize(
    "beginning", [b"", b"\x10", header(100) + b"\x93"], ids=["silent", "half", "halted"]
)
def test_half_open_connections_are_dropped(
    agent: RunningAgent, unharmed: Callable[[], None], beginning: bytes
) -> None:
    before = connections(agent)
    half_open = [RawClient(agent.socket) for _ in range(MANY)]
    for raw in half_open:
        raw.socket.sendall(beginning)
    unharmed()
    eventually(lambda: connections(agent) <= before)
    for raw in half_open:
        raw.close()


def test_announced_messages_allocate_no_memory(
    agent: RunningAgent, unharmed: Callable[[], None]
) -> None:
    before = resident(agent)
    announcing = [RawClient(agent.socket) for _ in range(MANY)]
    for raw in announcing:
        raw.greet()
        raw.socket.sendall(header(protocol.MAX_MESSAGE) + b"\x94\x05")
    unharmed()
    assert resident(agent) - before < MANY * protocol.MAX_MESSAGE / 10
    for raw in announcing:
        raw.close()


def test_client_that_reads_no_reply_is_dropped(
    agent: RunningAgent, unharmed: Callable[[], None]
) -> None:
    before = connections(agent)
    request = encode_frame(protocol.Status())
    with RawClient(agent.socket) as raw:
        raw.greet()
        # Fails when the socket's buffer is full or the agent closes the connection.
        with suppress(OSError):
            while True:
                raw.socket.send(request, socket.MSG_DONTWAIT)
        unharmed()
        eventually(lambda: connections(agent) <= before)


def test_thousands_of_descriptors_are_closed(
    agent: RunningAgent, unharmed: Callable[[], None]
) -> None:
    before = agent.descriptors()
    with RawClient(agent.socket) as raw, HostPool(1) as pool:
        raw.greet()
        for _ in range(20):
            reply = raw.ask(
                protocol.RegisterPool(0, pool.length), *[pool.descriptor] * FULL_MESSAGE
            )
            assert isinstance(reply, protocol.Refused)
        assert agent.descriptors() <= before + 2
        socket.send_fds(
            raw.socket, [header(100)], [pool.descriptor] * FULL_MESSAGE
        )  # without the rest
    unharmed()
    eventually(lambda: agent.descriptors() <= before)


def test_pools_of_a_client_are_bounded(agent: RunningAgent, unharmed: Callable[[], None]) -> None:
    with RawClient(agent.socket) as raw, HostPool(1, "greedy") as pool:
        raw.greet()
        replies = [
            raw.ask(protocol.RegisterPool(number, pool.length), pool.descriptor)
            for number in range(MAX_POOLS + 1)
        ]
        assert (
            replies.count(protocol.Done()) == MAX_POOLS - 1
        )  # the well-behaved client has one too
        assert isinstance(replies[-1], protocol.Refused)
        unharmed()
    eventually(lambda: not agent.maps("greedy"))


@pytest.mark.parametrize(
    "buffer",
    [
        (0, -1, 1),
        (0, -(2**63), 2**63 - 1),
        (0, 2**63 - 1, 2**63 - 1),
        (0, 2**64 - 1, 1),
        (0, 2**64 - 4096, 4096),
        (0, 0, -4096),
        (0, 0, 2**64 - 1),
        (0, 4096, 2**63 - 4096),
        (-1, 0, 1),
        (2**64 - 1, 0, 1),
    ],
)
def test_no_offset_reaches_outside_a_pool(
    agent: RunningAgent, unharmed: Callable[[], None], buffer: tuple[int, int, int]
) -> None:
    with HostPool(2) as pool, RawClient(agent.socket) as raw:
        raw.greet()
        assert raw.ask(protocol.RegisterPool(0, pool.length), pool.descriptor) == protocol.Done()
        wrong = [[Buffer(0, 0, BLOCK)], [Buffer(*buffer)]]
        hashes = b"".join(CHAIN.hashes[:2])
        for request in (
            protocol.LoadPages(CHAIN.namespace, hashes, wrong),
            protocol.SpillPages(CHAIN.namespace, hashes, wrong, b""),
        ):
            assert isinstance(raw.ask(request), protocol.Refused)
        assert pool.memory[:] == bytes(pool.length)


def test_concurrent_loads_into_the_same_memory_corrupt_only_their_owners_pages(
    agent: RunningAgent, unharmed: Callable[[], None]
) -> None:
    """One client loads in reverse order, so that different pages overlap."""
    with HostPool(len(CHAIN.hashes)) as pool, RawClient(agent.socket) as raw:
        token = raw.greet()
        raw.ask(protocol.RegisterPool(0, pool.length), pool.descriptor)
        hashes = b"".join(CHAIN.hashes)
        places = pool.buffers(0, range(len(CHAIN.hashes)))
        with RawClient(agent.socket) as second:
            second.greet(token)
            raw.send(protocol.LoadPages(CHAIN.namespace, hashes, places))
            second.send(protocol.LoadPages(CHAIN.namespace, hashes, places[::-1]))
            for client in (raw, second):
                assert isinstance(client.receive(), protocol.LoadedPages)


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 1_000_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x94\x05\xc6\xff\xff\xff\xff",
        b"\x94\x05\xc4\x00\xc4\x00\xdd\xff\xff\xff\xff",
        b"\x94\x05\xc4\x00\xc4\x00\xdd\x00\xf0\x00\x00" + b"\x90" * 0xF00000,
        b"\x94\x05\xc4\x00\xc4\x00\x91\xdd\x00\x3b\x00\x00" + b"\x93\x00\x00\x01" * 0x3B0000,
    ],
    ids=["nested", "outer list", "bytes", "list", "empty lists", "buffers"],
)
def test_oversized_message_is_rejected_at_once(
    agent: RunningAgent, unharmed: Callable[[], None], body: bytes
) -> None:
    before = resident(agent)
    with RawClient(agent.socket) as raw:
        raw.greet()
        raw.socket.sendall(header(len(body)) + body)
        assert isinstance(raw.receive(), protocol.Refused)
        assert isinstance(raw.ask(protocol.Status()), protocol.StatusReport)
    unharmed()
    assert resident(agent) - before < 4 * protocol.MAX_MESSAGE


GREEDY = """
import sys
from pathlib import Path
from tests.agent.agent_harness import RawClient
path, count, greeted = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "greeted"
clients, refused = [], ""
for _ in range(count):
    clients.append(RawClient(path))
    if greeted:
        try:
            clients[-1].greet()
        except AssertionError as error:
            refused = str(error)
print("has what it gets:", refused, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["silent", "greeted"])
def test_one_process_cannot_take_every_connection(
    agent: RunningAgent, unharmed: Callable[[], None], config: Config, kind: str
) -> None:
    command = [sys.executable, "-c", GREEDY, str(agent.socket), str(MAX_CONNECTIONS + 20), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as greedy:
        try:
            assert greedy.stdout is not None
            said = greedy.stdout.readline().decode()
            assert "has what it gets" in said
            if kind == "greeted":
                assert f"already has {MAX_CONNECTIONS_OF_PROCESS} connections" in said
            # Succeeds at once, although the others are still connected.
            with connected_client(config, limit=LIMIT) as client:
                assert client.lookup(CHAIN).complete
            unharmed()
        finally:
            greedy.kill()


@pytest.mark.parametrize("sessions", [1, 3])
def test_address_space_of_pools_is_bounded(
    agent: RunningAgent, unharmed: Callable[[], None], sessions: int
) -> None:
    """Sparse memory costs the client nothing: 45 such pools would exhaust the address space."""
    length = 1 << 46
    descriptor = os.memfd_create("sparse", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, length)
    greedy = [RawClient(agent.socket) for _ in range(sessions)]
    for raw in greedy:
        raw.greet()
        for number in range(60 // sessions):
            reply = raw.ask(protocol.RegisterPool(number, length), descriptor)
            assert isinstance(reply, protocol.Refused)
            assert "this process may map" in reply.reason
    os.close(descriptor)
    with HostPool(1) as pool, RawClient(agent.socket) as raw:
        raw.greet()
        assert raw.ask(protocol.RegisterPool(0, pool.length), pool.descriptor) == protocol.Done()
    unharmed()
    for raw in greedy:
        raw.close()


def test_descriptions_of_a_session_are_bounded(
    agent: RunningAgent, unharmed: Callable[[], None]
) -> None:
    with RawClient(agent.socket) as raw:
        raw.greet()
        # Exceeds the limit even if descriptions are allowed again meanwhile.
        for number in range(2 * MAX_DESCRIPTIONS):
            namespace = msgspec.structs.replace(NAMESPACE, revision=str(number))
            reply = raw.ask(protocol.Describe(namespace.description))
            if isinstance(reply, protocol.Refused):
                break
            assert reply == protocol.Described(namespace.digest)
        assert MAX_DESCRIPTIONS <= number < 2 * MAX_DESCRIPTIONS - 1
    with RawClient(agent.socket) as raw:
        raw.greet()
        assert isinstance(raw.ask(protocol.Describe(NAMESPACE.description)), protocol.Described)


def test_a_session_may_keep_publishing_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(sessions, "time", clock)
    session = Session(Pools(PoolBudget(), os.getpid()))

    def descriptions_taken() -> int:
        for count in range(2 * MAX_DESCRIPTIONS):
            try:
                session.count_description()
            except RequestError:
                return count
        raise AssertionError("every description was taken")

    assert descriptions_taken() == MAX_DESCRIPTIONS
    for seconds, more in ((0.5, 0), (0.5, 1), (3.0, 3), (1e9, MAX_DESCRIPTIONS)):
        clock.now += seconds * DESCRIPTION_INTERVAL
        assert descriptions_taken() == more


def test_log_lines_of_a_flood_of_bad_messages_are_limited(tmp_path: Path) -> None:
    with running_agent(make_config(tmp_path)) as agent:
        with RawClient(agent.socket) as raw:
            raw.greet()
            for _ in range(4 * BURST):
                raw.socket.sendall(header(1) + b"\xc1")
                assert isinstance(raw.receive(), protocol.Refused)
        _, log = agent.terminate()
    assert 0 < log.count("invalid request") <= BURST


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
stream = socket.socket(socket.AF_UNIX)
stream.settimeout(20)
try:
    stream.connect(sys.argv[1])
except PermissionError:
    sys.exit("not even connected")
sys.exit("answered" if stream.recv(1) else "closed")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_rejected_whatever_the_file_modes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config) as agent:

        def stranger() -> str:
            command = [sys.executable, "-c", STRANGER, str(agent.socket)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            return done.stderr.strip()

        assert stranger() == "not even connected"
        for place in (agent.socket, *agent.socket.parents):  # as after an incautious `chmod -R`
            if Path(tempfile.gettempdir()) in place.parents:
                place.chmod(0o777)
        assert stranger() == "closed"
        _, log = agent.terminate()
        assert "another user" in log and "uid=65534" in log
