"""Agents and clients of different versions, and sockets that do not belong to an agent."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.agent.launch import start_agent
from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.takeover import _count_connections
from memkv_sglang.config.schema import Config
from tests.agent.agent_harness import (
    LIMIT,
    MODULE,
    RawClient,
    alive,
    environment,
    eventually,
    running_agent,
)
from tests.agent.agent_harness import make_config as agent_config
from tests.cases.started_agents import answering, ending_agents

OWN = protocol.PROTOCOL_VERSION
AGENT = "memkv_sglang.agent.protocol.PROTOCOL_VERSION"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config = agent_config(tmp_path)
    with ending_agents(Path(config.agent.socket)):
        yield config


def start(config: Config) -> int:
    """Start an agent like a server does; return its pid."""
    assert start_agent(config, MODULE)
    peer = serving_peer(Path(config.agent.socket))
    assert peer is not None
    return peer.pid


def client_of(config: Config) -> "closing[AgentClient]":
    return closing(AgentClient(config, start=True, module=MODULE))


OTHER_VERSION = """
import sys
import memkv_sglang.agent.protocol as protocol
protocol.PROTOCOL_VERSION = int(sys.argv[1])
from tests.agent.agent_harness import *
client = AgentClient(make_config(Path(sys.argv[2])), start=True, module=MODULE)
eventually(lambda: "is newer" in client.problem)
print(client.wait(0), flush=True)
sys.stdin.read()
"""


def test_an_unused_older_agent_is_replaced(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    old = start(config)
    monkeypatch.setattr(AGENT, OWN + 1)
    with client_of(config) as client:
        eventually(lambda: not alive(old))
        # The agent that it starts here is no newer, and stays: it must not be stopped over and
        # over.
        eventually(lambda: f"protocol version {OWN}, this client {OWN + 1}" in client.problem)
    log = Path(config.agent.socket).with_name("agent.log").read_text()
    assert 'event="agent stopped"' in log, "it did not finish its uploads"


def test_older_agent_with_another_client_stays(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.client.reconnector.UNSUITABLE_PAUSE", 0.2)
    old = start(config)
    with RawClient(Path(config.agent.socket)) as other:
        other.greet()
        monkeypatch.setattr(AGENT, OWN + 1)
        with client_of(config) as client:
            eventually(lambda: "1 other connection" in client.problem)
            assert f"pid {old}" in client.problem
            assert f"kill {old}" in client.problem
            assert alive(old)
            other.close()
            eventually(lambda: not alive(old))


def test_connections_not_yet_accepted_count(tmp_path: Path) -> None:
    """A busy agent may have accepted another client, but not yet the client that would replace
    it.
    """
    path = str(tmp_path / "socket")
    with (
        closing(socket.socket(socket.AF_UNIX)) as listening,
        closing(socket.socket(socket.AF_UNIX)) as first,
        closing(socket.socket(socket.AF_UNIX)) as second,
    ):
        listening.bind(path)
        listening.listen()
        first.connect(path)
        with closing(listening.accept()[0]):
            assert _count_connections(os.getpid()) == 1
            second.connect(path)
            assert _count_connections(os.getpid()) == 2
            with closing(listening.accept()[0]):
                assert _count_connections(os.getpid()) == 2


def test_older_agent_started_by_hand_stays(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_agent(config) as agent:
        monkeypatch.setattr(AGENT, OWN + 1)
        # `module` is what servers start, which this one was not.
        with closing(AgentClient(config, start=True)) as client:
            eventually(lambda: "by hand or as a service" in client.problem)
            assert f"pid {agent.pid}" in client.problem
            assert alive(agent.pid)


def test_newer_agent_is_never_ended(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    agent = start(config)
    monkeypatch.setattr(AGENT, OWN - 1)
    with client_of(config) as client:
        eventually(lambda: "is newer" in client.problem)
        assert f"pid {agent}" in client.problem
        assert "install the same sglang-memkv here" in client.problem
        assert alive(agent)
    assert caplog.text.count("is newer") == 1


def test_client_of_another_version_does_the_same(config: Config, tmp_path: Path) -> None:
    agent = start(config)
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_VERSION, str(OWN - 1), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    out, _ = process.communicate(timeout=2 * LIMIT)
    assert out.strip() == "False"
    assert alive(agent)


LATER = [
    [0, OWN + 1],
    [0, OWN + 1, {"token": "t", "features": [1, 2]}],
    [0, 1 << 40, None, 1.5, [[]], b"x" * 100_000],
    [0, 1],
    [0, -1, "x"],
]


@pytest.mark.parametrize("hello", LATER)
def test_hello_of_any_version_is_answered_with_our_version(config: Config, hello: object) -> None:
    with running_agent(config) as agent, RawClient(agent.socket) as raw:
        assert raw.ask(hello) == protocol.Welcome(OWN)


def framed(message: object) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


GARBAGE = {
    "nothing": b"",
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "no message": b"\x01\x00\x00\x00\xc1",
    "too long": b"\xff\xff\xff\xff",
    "no array": framed({"version": 1}),
    "another message": framed([34]),
    "welcome without a version": framed([32]),
    "welcome with a text": framed([32, "1"]),
    "session that is none": framed([32, OWN, {"a": 1}]),
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_process_that_is_not_an_agent_is_left_alone(config: Config, answer: bytes) -> None:
    with answering(Path(config.agent.socket), answer), client_of(config) as client:
        eventually(lambda: client.problem != "no agent yet")
        eventually(
            lambda: str(os.getpid()) in client.problem or "answered Hello with" in client.problem
        )


@pytest.mark.parametrize(
    "answer",
    [
        framed([32, OWN - 1, b"t"]),
        framed([32, -5]),
        framed([32, OWN + 1, {"a": 1}, None]),
    ],
)
def test_process_that_claims_to_be_an_agent_is_not_killed(
    config: Config, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        with answering(Path(config.agent.socket), answer), client_of(config) as client:
            eventually(lambda: f"pid {os.getpid()}" in client.problem)
            assert "older" in client.problem or "newer" in client.problem
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not received
