"""Helpers for tests of the agent and the client: an agent, a host pool, and waiting."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from memkv_testbed import host_pool

from memkv_sglang.agent import protocol
from memkv_sglang.agent.wire import Channel, encode_frame
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import AgentConfig, Config
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_namespace
from tests.agent.agent_for_tests import BEHAVIOUR, CALLS, UPLOADS

MODULE = "tests.agent.agent_for_tests"
BLOCK = 4096
PAGE_BUFFERS = 2
PAGE_BYTES = PAGE_BUFFERS * BLOCK
NAMESPACE = make_namespace(PAGE_BYTES)
LIMIT = 20.0
"""Seconds after which a test gives up waiting."""


def make_config(directory: Path, **agent: object) -> Config:
    """Return settings for an agent whose socket is in a directory of its own."""
    values = {"socket": str(directory / "run" / "agent.sock"), **agent}
    return Config(agent=msgspec.convert(values, AgentConfig))


def environment(
    behaviour: str = "0", uploads: Path | None = None, calls: Path | None = None
) -> dict[str, str]:
    """Return the environment variables of an agent for tests; see `agent_for_tests`."""
    return {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        BEHAVIOUR: behaviour,
        UPLOADS: str(uploads or ""),
        CALLS: str(calls or ""),
    }


def eventually(condition: Callable[[], object], limit: float = LIMIT) -> None:
    """Wait until the condition holds; fails if it does not."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {limit:g} s"
        time.sleep(0.005)


def entries(directory: str) -> int:
    """Return how many entries a directory (of /proc) has."""
    return sum(1 for _ in Path(directory).iterdir())


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def maps(pid: int, name: str) -> bool:
    """Return whether a process maps a memfd of this name."""
    return f"/memfd:{name} " in Path(f"/proc/{pid}/maps").read_text()


class RunningAgent:
    """An agent in the foreground of a child process."""

    def __init__(self, config: Config, env: dict[str, str]) -> None:
        self.socket = Path(config.agent.socket)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **env},
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(config))
        self.process.stdin.close()
        self.process.stdin = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> None:
        """Wait until clients are served."""
        eventually(self._greets)

    def _greets(self) -> bool:
        assert self.process.poll() is None, "the agent did not start"
        try:
            with RawClient(self.socket) as raw:
                raw.greet()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def terminate(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return exit status and log."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return exit status and log."""
        _, log = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, log.decode()

    def descriptors(self) -> int:
        return entries(f"/proc/{self.pid}/fd")

    def threads(self) -> int:
        return entries(f"/proc/{self.pid}/task")

    def maps(self, name: str) -> bool:
        """Return whether the agent maps a memfd of this name."""
        return maps(self.pid, name)


@contextmanager
def running_agent(
    config: Config,
    behaviour: str = "0",
    uploads: Path | None = None,
    calls: Path | None = None,
) -> Iterator[RunningAgent]:
    """Run an agent; kill it at the end if it is still running."""
    agent = RunningAgent(config, environment(behaviour, uploads, calls))
    try:
        agent.wait_ready()
        yield agent
    finally:
        agent.process.kill()
        agent.process.wait()
        if agent.process.stderr is not None:
            agent.process.stderr.close()


@contextmanager
def connected_client(config: Config, limit: float = 8.0) -> Iterator[AgentClient]:
    """Return a client that is connected to the agent."""
    client = AgentClient(config, start=False, limit=limit)
    try:
        assert client.wait(LIMIT), client.problem
        yield client
    finally:
        client.close()


class HostPool(host_pool.HostPool):
    """Pages of `PAGE_BYTES`, each of `PAGE_BUFFERS` buffers."""

    def __init__(self, pages: int, name: str = "pool", flags: int = os.MFD_ALLOW_SEALING) -> None:
        super().__init__(pages, PAGE_BYTES, parts=PAGE_BUFFERS, name=name, flags=flags)

    def holds(self, chain: Chain, first: int = 0) -> bool:
        """Return whether the chain's pages have their exact content."""
        return not self.wrong(chain, first)


class RawClient:
    """A client that can send arbitrary messages."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self._channel: Channel[protocol.Reply] = Channel(
            self.socket, msgspec.msgpack.Decoder(protocol.Reply)
        )

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def ask(self, request: object, *descriptors: int) -> protocol.Reply:
        # The agent may refuse the client before it has read the request.
        with suppress(BrokenPipeError):
            self.send(request, *descriptors)
        return self.receive()

    def send(self, request: object, *descriptors: int) -> None:
        self._channel.send(encode_frame(request), descriptors)

    def receive(self) -> protocol.Reply:
        return self._channel.receive(time.monotonic() + LIMIT)

    def greet(self, session: bytes = b"") -> bytes:
        reply = self.ask(protocol.Hello(protocol.PROTOCOL_VERSION, session))
        assert isinstance(reply, protocol.Welcome), reply
        assert isinstance(reply.session, bytes)
        return reply.session
