"""Run a process that never outlives the one that started it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

# Kills the process group in its argument when its standard input is closed, either by the process
# that started it or by that process's death.
_GUARD = """
import os, signal, sys
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108 (where Linux keeps it)
_KILLED_WITHIN_S = 10.0
_POLL_S = 0.1
_LOG_TAIL_CHARACTERS = 3000


class ProcessFailedError(RuntimeError):
    """The process ended or was not ready in time. The message contains the end of its log."""


class Process(Protocol):
    """A process in a session of its own; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Id of the process, and of its group."""

    def poll(self) -> int | None:
        """Return None while the process runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises `subprocess.TimeoutExpired` after `timeout` seconds."""

    def terminate(self) -> None:
        """Send SIGTERM."""


class ManagedProcess:
    """A process and its descendants, in one process group, with output to a log file.

    A guard process kills the group when this object is stopped, or when this process dies. Children
    that leave the group are not killed.
    """

    def __init__(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None, log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._argv = list(argv)
        self._env = _without_proxy(os.environ if env is None else env)
        self._process: Process | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Id of the process and of its group.

        Raises:
            ProcessFailedError: it is not running.

        """
        if self._process is None:
            raise ProcessFailedError(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the process. Returns at once. Output is appended to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = self._launch(log.fileno())
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-c", _GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _launch(self, log: int) -> Process:
        return subprocess.Popen(
            self._argv,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Block until `ready` is true.

        Raises:
            ProcessFailedError: the process ended, or `timeout_s` has passed.

        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self._process is None or self._process.poll() is not None:
                raise ProcessFailedError(f"{self.name} ended early\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ProcessFailedError(
                    f"{self.name} was not ready within {timeout_s:.0f} s\n{self.log_tail()}"
                )
            time.sleep(_POLL_S)

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Stop the process with SIGTERM, then its group with SIGKILL. Blocks until all have exited.

        Idempotent.
        """
        if self._process is None:
            return
        self._process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the process and its group with SIGKILL, as a crash would. Idempotent."""
        process, guard = self._process, self._guard
        self._process = self._guard = None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if guard is not None:
            guard.communicate()
        deadline = time.monotonic() + _KILLED_WITHIN_S
        while group_members(process.pid):
            if time.monotonic() > deadline:
                raise ProcessFailedError(
                    f"{self.name}: processes still running in group {process.pid}"
                )
            time.sleep(_POLL_S)

    def log_tail(self) -> str:
        """Return the end of the log."""
        if not self.log.exists():
            return ""
        return self.log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _without_proxy(env: Mapping[str, str]) -> dict[str, str]:
    """Exclude loopback from proxies, which SGLang and the router would otherwise use."""
    excluded = env.get("no_proxy") or env.get("NO_PROXY") or ""
    hosts = ",".join(filter(None, [excluded, "127.0.0.1", "localhost"]))
    return {**env, "no_proxy": hosts, "NO_PROXY": hosts}


def shared_memory_of(group: int) -> set[Path]:
    """Return the shared memory files that the processes of a group have mapped."""
    mapped: set[Path] = set()
    for pid in group_members(group):
        with contextlib.suppress(OSError):  # the process has ended
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = line[line.find("/") :]
                if path.startswith(_SHARED_MEMORY) and not path.endswith(" (deleted)"):
                    mapped.add(Path(path))
    return mapped


def group_members(group: int) -> list[int]:
    """Return the ids of a group's processes that are running. Zombies do not count."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # proc(5): pid (comm) state ppid pgrp ...; comm may contain anything.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            members.append(int(entry.name))
    return members
