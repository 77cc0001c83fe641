"""Start servers as forks of a process that has imported SGLang, which takes about 19 s of a core.

A fork server has one thread and has loaded no plugin. A fork continues like a process that SGLang
spawned: its modules are imported, then it loads its plugins and starts.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from sglang_cpu_platform.process import ManagedProcess, Process, ProcessFailedError

PRELOADED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
)
FIXED = ("PYTHONPATH", "LD_LIBRARY_PATH", "SGLANG_PLUGINS", "OMP_NUM_THREADS")
"""Environment variables that take effect before or while SGLang is imported."""
REQUEST_BYTES = 128 << 10


class ForkServers:
    """Fork servers by interpreter, with a prefix such as `nsenter`, and `FIXED`.

    Each starts when it is first needed.

    Close it after the servers that it started. Not thread-safe.
    """

    def __init__(self) -> None:
        self._servers: dict[tuple[str | None, ...], _ForkServer] = {}
        self._stack = ExitStack()

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: int) -> Process:
        """Start `[prefix] python -m module ...` in a new session; output goes to `log`.

        Blocks while a fork server imports SGLang.

        Raises:
            ProcessFailedError: the fork server has ended.

        """
        if "-m" not in argv:
            raise ValueError(f"cannot fork {argv}")
        at = argv.index("-m")
        python, module = argv[:at], argv[at + 1 :]
        key = (*python, *map(env.get, FIXED))
        if key not in self._servers:
            logs = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fork-server-"))
            server = _ForkServer(python, env, Path(logs) / "log")
            self._servers[key] = self._stack.enter_context(server)
        return self._servers[key].fork(module, env, log)

    def close(self) -> None:
        """Stop the fork servers. Idempotent."""
        self._stack.close()
        self._servers.clear()


class _ForkServer(ManagedProcess):
    def __init__(self, python: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        argv = [*python, "-m", "sglang_cpu_platform.fork_server"]
        super().__init__("fork server", argv, env=env, log=log)
        self._socket, self._its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def _launch(self, log: int) -> Process:
        with self._its:
            return subprocess.Popen(
                self._argv,
                env=self._env,
                stdin=self._its.fileno(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def fork(self, module: Sequence[str], env: Mapping[str, str], log: int) -> Process:
        request = json.dumps([list(module), dict(env), str(Path.cwd())]).encode()
        try:
            socket.send_fds(self._socket, [request], [log])
            answer, fds, _, _ = socket.recv_fds(self._socket, 64, 1)
        except OSError:
            answer = b""
        if not answer:
            raise ProcessFailedError(f"the fork server has ended\n{self.log_tail()}")
        return _Fork(int(answer), fds[0])

    def kill(self) -> None:
        super().kill()
        self._socket.close()


class _Fork:
    """A process that the fork server started. Its id stays reserved until the fork server ends."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        ended = self._ended(timeout)
        if ended is None:
            raise subprocess.TimeoutExpired("a fork", timeout or 0)
        return ended

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def _ended(self, timeout: float | None) -> int | None:
        """Wait for the end; return the status, or None if only the fork server knows it."""
        readable, _, _ = select.select([self._pidfd], [], [], timeout)
        return -1 if readable else None

    def __del__(self) -> None:
        os.close(self._pidfd)


def main() -> None:
    """Import SGLang, then fork for each request until the other end is closed."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that garbage collections in a fork copy no memory
    with socket.socket(fileno=os.dup(0)) as requests:
        while True:
            request, fds, _, _ = socket.recv_fds(requests, REQUEST_BYTES, 1)
            if not request:
                return
            if not os.fork():
                break
            os.close(fds[0])
        os.setsid()
        pid = os.getpid()
        answer = os.pidfd_open(pid)
        socket.send_fds(requests, [str(pid).encode()], [answer])
        os.close(answer)
    _run(fds[0], *json.loads(request))


def _run(log: int, module: list[str], env: dict[str, str], directory: str) -> None:
    import setproctitle

    sys.argv = module
    # Do this before the environment changes, because setproctitle looks for memory between the old
    # variables.
    setproctitle.setproctitle(" ".join([sys.executable, "-m", *sys.argv]))
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    runpy.run_module(module[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
