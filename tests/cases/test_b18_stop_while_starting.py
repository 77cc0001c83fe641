"""SIGTERM and Ctrl-C end every phase of a start within a second and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.config.schema import AgentConfig, Config, NvmeConfig
from memkv_sglang.testing.conformance import spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.journal import PUT, Journal, Kind
from memkv_sglang.tiers.nvme.segment import (
    HEADER_SIZE,
    Header,
    create_segment,
    pack_header,
    segment_name,
)
from tests.agent.agent_harness import LIMIT, RawClient, alive, eventually

SLOT = 8192
SLOTS = (1 << 30) // SLOT - 1
STOP_LIMIT = 2.0
"""Seconds for a stop: one on an idle machine, and one more on a busy one."""


class Start:
    """An agent that is starting on a directory."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self.directory = directory
        self.socket = directory / "run" / "agent.sock"
        config = Config(
            agent=AgentConfig(socket=str(self.socket), drain_timeout=0.0),
            nvme=NvmeConfig(directory=str(directory / "pages"), capacity=capacity),
        )
        code = (
            "import sys, msgspec\n"
            "from memkv_sglang.agent.main import run\n"
            "from memkv_sglang.config.schema import Config\n"
            "sys.exit(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Config)))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(config))
        self.process.stdin.close()
        self.process.stdin = None

    def stop(self, number: int) -> tuple[float, int, str]:
        """Send a signal; return the seconds until the exit, the exit status and the log."""
        began = time.monotonic()
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=60)
        return time.monotonic() - began, self.process.returncode, log.decode()

    def is_ready(self) -> bool:
        try:
            with RawClient(self.socket) as raw:
                raw.greet()
        except OSError:
            return False
        return True

    def left_behind(self) -> list[str]:
        """Return everything that an agent left behind and should not have."""
        found = [path.name for path in self.directory.rglob("*.new")]
        return [*found, *(path.name for path in self.directory.rglob("*.sock"))]


@contextmanager
def starting(directory: Path, capacity: int) -> Iterator[Start]:
    start = Start(directory, capacity)
    try:
        yield start
    finally:
        start.process.kill()
        start.process.wait()


def make_directory(directory: Path, segments: int, *, journal: bool) -> None:
    """Make a directory with that many GiB of slots; the journal has a page in each slot."""
    NvmeTier(NvmeConfig(directory=str(directory / "pages"), capacity=1 << 30)).close()
    root, records = Folder.at(directory / "pages"), []
    folder = root.subfolder("segments")
    for number in range(segments):
        segment = create_segment(folder, number, SLOT, 1, direct=False)
        segment.close()
        grow(directory / "pages" / "segments" / segment_name(number), number)
        records.append(
            b"".join(
                PUT.pack(b"n" * 16, (number << 32 | s).to_bytes(32, "big"), number, s, 4096, s + 1)
                for s in range(SLOTS)
            )
        )
    root.remove("journal")
    if journal:
        written = Journal.create(root)
        for record in records:
            written.append(Kind.PUT, record)
        written.close()
    folder.close()
    root.close()


def grow(path: Path, number: int) -> None:
    """Extend a segment of one slot to a sparse file of many."""
    with path.open("r+b") as file:
        file.write(pack_header(Header(number, SLOT, SLOTS)))
        file.truncate(HEADER_SIZE + SLOTS * SLOT)


def logged(event: str) -> Callable[[Start], bool]:
    def has_logged(start: Start) -> bool:
        assert start.process.stderr is not None
        os.set_blocking(start.process.stderr.fileno(), False)
        text = start.process.stderr.read() or b""
        os.set_blocking(start.process.stderr.fileno(), True)
        return event.encode() in text

    return has_logged


def opens(name: str) -> Callable[[Start], bool]:
    """Return whether the agent has a file of this name open, even if it was removed."""

    def has_open(start: Start) -> bool:
        try:
            links = [p.readlink().name for p in Path(f"/proc/{start.process.pid}/fd").iterdir()]
        except OSError:
            return False
        return any(link.startswith(name) for link in links)

    return has_open


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("phase", ["footers", "journal", "shrink"])
def test_start_ends_within_a_second(tmp_path: Path, phase: str, number: int) -> None:
    make_directory(tmp_path, 8, journal=phase != "footers")
    capacity = 40 << 30 if phase != "shrink" else 4 << 30
    begun = logged("scanning footers") if phase == "footers" else opens("00000007.seg")
    with starting(tmp_path, capacity) as start:
        eventually(lambda: begun(start))
        if phase == "shrink":
            time.sleep(2.0)
        seconds, status, log = start.stop(number)
        assert seconds < STOP_LIMIT
        assert status == 0, log
        assert "Traceback" not in log
        assert start.left_behind() == []
        assert not start.is_ready()


def test_directory_is_intact_after_any_interrupted_start(tmp_path: Path) -> None:
    config = NvmeConfig(directory=str(tmp_path / "pages"), capacity=64 << 20)
    tier, keys = NvmeTier(config), make_chain(make_namespace(), 200).keys()
    spill(tier, keys)
    tier.close()
    for i in range(12):
        if i % 2:
            (tmp_path / "pages" / "journal").unlink(missing_ok=True)
        with starting(tmp_path, 64 << 20) as start:
            eventually(lambda: start.socket.exists() or start.is_ready())
            time.sleep(i * 0.01)
            start.stop(signal.SIGTERM)
            assert start.left_behind() == []
    tier = NvmeTier(config)
    assert all(tier.present(keys, 0))
    assert tier.check_integrity() == []
    tier.close()


def test_start_that_cannot_be_interrupted_ends_anyway(tmp_path: Path) -> None:
    """The start blocks in a function that cannot be interrupted, as on a broken disk."""
    code = (
        "import ctypes, sys\n"
        "from memkv_sglang.agent.main import run\n"
        "from memkv_sglang.config.schema import AgentConfig, Config\n"
        "def build(config, registry):\n"
        "    print('building', flush=True)\n"
        "    while True:\n"
        "        ctypes.CDLL(None).sleep(60)\n"  # ends at a signal, which Python handles only later
        "def deaf(config, registry):\n"
        "    while True:\n"
        "        try: build(config, registry)\n"
        "        except BaseException: pass\n"
        "run(Config(agent=AgentConfig(socket=sys.argv[1])), build=deaf)"
    )
    path = tmp_path / "run" / "agent.sock"
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    began = time.monotonic()
    process.terminate()
    process.stdout.close()
    assert process.wait(LIMIT) == 1
    assert time.monotonic() - began < STOP_LIMIT
    assert not path.exists()
    assert not alive(process.pid)


def test_working_agent_with_many_pages_ends_within_a_second(tmp_path: Path) -> None:
    make_directory(tmp_path, 8, journal=True)
    with starting(tmp_path, 40 << 30) as start:
        eventually(start.is_ready, 60)
        with RawClient(start.socket) as raw:
            raw.greet()
            assert isinstance(raw.ask(protocol.Status()), protocol.StatusReport)
        seconds, status, log = start.stop(signal.SIGTERM)
    assert seconds < STOP_LIMIT
    assert status == 0
    assert start.left_behind() == []
    assert "agent stopped" in log
