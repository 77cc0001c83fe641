"""Neither clients, traffic nor clock changes can flood or silence the agent's log, or fill it with
tracebacks.
"""

import ctypes
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from memkv_testbed.fuzz import REQUESTS, damage, odd_request

from memkv_sglang.agent import log_file, protocol
from memkv_sglang.agent.launch import start_agent
from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.agent.log import BURST, PERIOD, FloodFilter
from memkv_sglang.agent.log_file import LOG_LIMIT, limit_log, open_log
from memkv_sglang.agent.paths import agent_log
from memkv_sglang.agent.wire import MessageError, encode_frame
from memkv_sglang.config.schema import Config
from tests.agent.agent_harness import (
    MODULE,
    NAMESPACE,
    RawClient,
    RunningAgent,
    alive,
    environment,
    eventually,
    make_config,
    running_agent,
)
from tests.agent.test_agent_log import Clock, line

FLOOD_SECONDS = 3.0
LOG_BYTES = 200_000
"""Bytes that all floods of a module may log: a few kinds of lines, each with a burst."""
RSS_GROWTH = 64 << 20


class Running:
    """An agent whose log is read continuously."""

    def __init__(self, agent: RunningAgent, config: Config) -> None:
        self.agent, self.config, self.log = agent, config, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.agent.process.stderr is not None
        with suppress(ValueError, OSError):
            while piece := os.read(self.agent.process.stderr.fileno(), 65536):
                self.log += piece

    def rss(self) -> int:
        status = Path(f"/proc/{self.agent.pid}/statm").read_text()
        return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def is_well(self) -> bool:
        """Return whether the agent serves and has logged no traceback."""
        with RawClient(self.agent.socket) as raw:
            raw.greet()
            assert isinstance(raw.ask(protocol.Status()), protocol.StatusReport)
        return b"Traceback" not in self.log and self.agent.process.poll() is None


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    config = make_config(tmp_path)
    with running_agent(config) as agent:
        yield Running(agent, config)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize("depth", [900, 1100, 5000, 200_000])
@pytest.mark.parametrize(
    "head", [b"", b"\x92\x09", b"\x93\x04", b"\x99\x09"], ids=["alone", "extra", "field", "many"]
)
def test_nested_message_is_refused_in_one_line(running: Running, head: bytes, depth: int) -> None:
    with RawClient(running.agent.socket) as raw:
        raw.greet()
        for nest in (b"\x91", b"\x81\xa1a"):
            raw.socket.sendall(framed(head + nest * depth + b"\xc0"))
            reply = raw.receive()
            assert not isinstance(reply, protocol.Refused) or "\n" not in reply.reason
    assert running.is_well()


def test_nested_description_is_refused_in_one_line(running: Running) -> None:
    with RawClient(running.agent.socket) as raw:
        raw.greet()
        for text in (b'{"details":{"a":' + b"[" * 30_000, b'{"x":' + b"[" * 30_000, b"\xff", b"1"):
            assert isinstance(raw.ask(protocol.Describe(text)), protocol.Refused)
    assert running.is_well()


def flood(running: Running, number: int) -> None:
    """Send requests that the agent refuses."""
    chance, end = random.Random(number), time.monotonic() + FLOOD_SECONDS
    bad = [
        protocol.ReleasePool(99),
        protocol.LoadPages(NAMESPACE.digest, b"x" * 31, []),
        protocol.Clear(b"x"),
        protocol.Describe(b"x" * 60_000),
        protocol.Hello(3),
        protocol.SpillPages(b"", b"", [], b""),
    ]
    while time.monotonic() < end:
        with suppress(OSError, EOFError, MessageError), RawClient(running.agent.socket) as raw:
            match number:
                case 0:
                    raw.greet()
                    for request in bad * 20:
                        raw.ask(request)
                case 1:
                    raw.socket.sendall(b"\xff\xff\xff\xff")
                case 2:
                    raw.ask(protocol.Hello(9999))
                case 3:
                    raw.socket.sendall(framed(chance.randbytes(chance.randrange(60))))
                case _:
                    raw.ask(protocol.Hello(protocol.PROTOCOL_VERSION, b"no such session!"))


def test_floods_write_little_and_retain_nothing(running: Running) -> None:
    assert running.is_well()
    before, descriptors = running.rss(), running.agent.descriptors()
    threads = running.agent.threads()
    floods = [threading.Thread(target=flood, args=(running, number)) for number in range(5)]
    for thread in floods:
        thread.start()
    for thread in floods:
        thread.join()
    assert running.is_well()
    eventually(lambda: running.agent.descriptors() <= descriptors)
    eventually(lambda: running.agent.threads() <= threads)
    assert running.rss() - before < RSS_GROWTH
    assert len(running.log) < LOG_BYTES
    assert max(map(len, running.log.splitlines())) < 1000


def test_an_hour_of_refusals_is_a_few_lines(clock: Clock) -> None:
    flood_filter, passed = FloodFilter(), 0
    for _ in range(3600):
        passed += sum(flood_filter.filter(line("request refused")) for _ in range(50))
        clock.now += 1.0
    assert passed <= BURST + 3600 / PERIOD + 1


def test_clock_set_back_silences_nothing(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    flood_filter, now = FloodFilter(), time.time()
    for _ in range(2 * BURST):
        flood_filter.filter(line("event"))
    for wrong in (now - 1800, now + 10**6, 0.0):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        clock.now += PERIOD
        assert flood_filter.filter(line("event"))
        assert not flood_filter.filter(line("event"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """The log and the pid of an agent that a program started."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config = make_config(tmp_path, log_level="debug")
    assert start_agent(config, MODULE)
    peer = serving_peer(Path(config.agent.socket))
    assert peer is not None
    yield agent_log(Path(config.agent.socket)), peer.pid
    os.kill(peer.pid, signal.SIGKILL)
    eventually(lambda: not alive(peer.pid))


def test_log_rotates_while_the_agent_runs(launched: tuple[Path, int]) -> None:
    """The log stays bounded even if others write to it, like a C library that writes to stderr."""
    path, pid = launched
    for _ in range(3):
        with Path(f"/proc/{pid}/fd/2").open("ab", buffering=0) as stderr:
            stderr.write(b"x" * (LOG_LIMIT + 1))
        eventually(lambda: path.exists() and path.stat().st_size < LOG_LIMIT)
        assert path.with_name("agent.log.1").stat().st_size > LOG_LIMIT
        assert Path(f"/proc/{pid}/fd/2").readlink() == path
        assert Path(f"/proc/{pid}/fd/1").readlink() == path
    assert len(list(path.parent.glob("agent.log*"))) == 2


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_removed_log_file_is_recreated(launched: tuple[Path, int], how: str) -> None:
    path, pid = launched
    if how == "moved":
        path.rename(path.with_name("elsewhere"))
    else:
        path.unlink()
    eventually(path.exists)
    eventually(lambda: Path(f"/proc/{pid}/fd/2").readlink() == path)


def test_log_without_its_directory_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gone" / "agent.log"
    path.parent.mkdir()
    with os.fdopen(open_log(path), "a") as stderr:
        monkeypatch.setattr(log_file.sys, "stderr", stderr)  # type: ignore[attr-defined]
        os.truncate(path, LOG_LIMIT + 1)
        path.unlink()
        path.parent.rmdir()
        limit_log(path)
        assert os.fstat(stderr.fileno()).st_size == 0


def ancillary(chance: random.Random) -> list[tuple[int, int, bytes]]:
    """Return ancillary data with a random, mostly unexpected number of descriptors."""
    fds = [0] * chance.choice((0, 1, 2, 4, 5, 100))
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(map(ctypes.c_int, fds)))]


def send_in_pieces(sock: socket.socket, frame: bytes, chance: random.Random) -> None:
    while frame:
        length = chance.choice((1, 2, 3, 4, 5, 100, 70_000))
        piece, frame = frame[:length], frame[length:]
        if chance.random() < 0.1:
            sock.sendmsg([piece], ancillary(chance))
        else:
            sock.sendall(piece)


def test_malformed_requests_neither_stop_nor_bloat_the_agent(running: Running) -> None:
    assert running.is_well()
    chance, before, descriptors = random.Random(15), running.rss(), running.agent.descriptors()
    end = time.monotonic() + 2 * FLOOD_SECONDS
    valid = [bytes(encode_frame(request)) for request in REQUESTS]
    while time.monotonic() < end:
        with suppress(OSError, EOFError, MessageError), RawClient(running.agent.socket) as raw:
            if chance.random() < 0.95:
                raw.greet()
            for _ in range(chance.randrange(1, 10)):
                frame = odd_request(REQUESTS, chance)
                if chance.random() < 0.3:
                    frame = damage(chance.choice([frame, *valid]), chance)
                if frame[4:6] == bytes([0x91, 10]) or len(frame) < 5:
                    continue  # would ask the agent to exit
                send_in_pieces(raw.socket, frame, chance)
                raw.socket.settimeout(0.2)
                raw.socket.recv(1 << 20)
    assert running.is_well()
    eventually(lambda: running.agent.descriptors() <= descriptors)
    assert running.rss() - before < RSS_GROWTH
    assert len(running.log) < LOG_BYTES
