"""Processes that never outlive the one that started them."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sglang_cpu_platform", reason="needs the distribution sglang-cpu-platform")

from sglang_cpu_platform.process import (
    ManagedProcess,
    ProcessFailedError,
    group_members,
    shared_memory_of,
)

# A process that ignores SIGTERM, and so does its child.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print("ready", flush=True)
time.sleep(600)
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def stubborn(log: Path) -> ManagedProcess:
    return ManagedProcess("stubborn", [sys.executable, "-c", STUBBORN], env=None, log=log)


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    process = stubborn(tmp_path / "log")
    process.start()
    process.wait_until(lambda: process.log_tail().count("ready") == 2, timeout_s=20)
    group = process.pid
    assert len(group_members(group)) == 2
    process.stop(grace_s=0.2)
    assert group_members(group) == []
    process.stop()


def test_nothing_is_left_when_the_starter_is_killed(tmp_path: Path) -> None:
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from sglang_cpu_platform.process import ManagedProcess\n"
            f"process = ManagedProcess('x', [sys.executable, '-c', {STUBBORN!r}], env=None,"
            f" log=Path({str(tmp_path / 'log')!r}))\n"
            "process.start(); print(process.pid, flush=True); time.sleep(600)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    group = int(starter.stdout.readline())
    wait_for(lambda: len(group_members(group)) == 2)
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    wait_for(lambda: group_members(group) == [])


def test_error_says_why_a_process_ended_early(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "print('no such model'); exit(3)"]
    with (
        ManagedProcess("broken", argv, env=None, log=tmp_path / "log") as process,
        pytest.raises(ProcessFailedError, match="broken ended early\nno such model"),
    ):
        process.wait_until(lambda: False, timeout_s=20)


def test_gives_up_on_a_process_that_is_never_ready(tmp_path: Path) -> None:
    with (
        stubborn(tmp_path / "log") as process,
        pytest.raises(ProcessFailedError, match="was not ready within"),
    ):
        try:
            process.wait_until(lambda: False, timeout_s=0.3)
        finally:
            process.kill()


MAP_A_FILE = """
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_shared_memory_of_a_group_is_found() -> None:
    path = Path(f"/dev/shm/memkv-test-{uuid.uuid4().hex}")
    process = subprocess.Popen(
        [sys.executable, "-c", MAP_A_FILE, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "mapped\n"
            assert shared_memory_of(process.pid) == {path}
            assert process.stdin is not None
            process.stdin.close()
        assert shared_memory_of(process.pid) == set()
    finally:
        path.unlink(missing_ok=True)
