"""Run SGLang servers on a plain CPU, for demos, tests and benchmarks."""

import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_cpu_platform import forking
from sglang_cpu_platform.client import Client
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.process import (
    ManagedProcess,
    Process,
    ProcessFailedError,
    shared_memory_of,
)

HOST = "127.0.0.1"
PORTS = range(10_000, 30_000)
"""Ports to choose from. They are below Linux's ephemeral ports (`ip_local_port_range`, from 32768).
"""
START_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line and the environment it needs."""

    argv: list[str]
    env: dict[str, str]


def launch(
    model: Path,
    port: int,
    *,
    page_size: int | None = None,
    tp: int = 1,
    max_total_tokens: int = 65536,
    extra: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
    host: str = HOST,
) -> Launch:
    """Return the command line and environment of an SGLang server on a plain CPU.

    Args:
        model: directory of the model.
        port: port to listen on.
        page_size: tokens per page; None leaves the choice to SGLang or a plugin.
        tp: tensor-parallel ranks, each bound to one core.
        max_total_tokens: size of the device pool in tokens; HiCache's host pool has twice that.
        extra: further arguments of `sglang.launch_server`. They override the ones set here.
        env: further environment variables. They override the ones set here.
        python: interpreter of the environment in which SGLang is installed.
        host: address to listen on.

    """
    argv = [
        python, "-m", "sglang.launch_server",
        "--model-path", str(model),
        "--served-model-name", "tiny",
        "--host", host,
        "--port", str(port),
        "--tp-size", str(tp),
        # "auto" would convert float32 to bfloat16, and greedy texts would differ between runs.
        "--dtype", "float32",
        "--max-total-tokens", str(max_total_tokens),
        # SGLang computes its default from the sizes of GPUs. The line above sets the actual size.
        "--mem-fraction-static", "0.8",
        "--max-running-requests", "16",
        "--enable-cache-report",
        "--sleep-on-idle",
    ]  # fmt: skip
    if page_size is not None:
        argv += ["--page-size", str(page_size)]
    settings = {
        # SGLang calls ninja by name to compile its page-hash extension.
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        # More threads than cores would only compete with each other.
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        forking.VARIABLE: "1",
    }
    if tp > 1:
        settings["SGLANG_CPU_OMP_THREADS_BIND"] = _one_core_per_rank(tp)
    return Launch([*argv, *extra], {**os.environ, **settings, **(env or {})})


def _one_core_per_rank(ranks: int) -> str:
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on now.

    It is not ephemeral, because the kernel could use an ephemeral port for another connection while
    the server starts.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((HOST, port))
            return port
    raise OSError("no port is free")


class CpuServer(ManagedProcess):
    """A server that runs during a `with` block and is ready when the block begins.

    To start several at once, call `start` on each, then `wait_ready` on each, and `stop`. Takes the
    arguments of `launch`, and chooses a free port. With `forks`, the process starts without
    importing SGLang again. `prefix` is a command that runs the server's command line, such as
    `nsenter`; it must replace itself with the server.
    """

    def __init__(
        self,
        model: Path,
        *,
        log: Path,
        page_size: int | None = None,
        tp: int = 1,
        max_total_tokens: int = 65536,
        extra: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        host: str = HOST,
        prefix: Sequence[str] = (),
        forks: ForkServers | None = None,
    ) -> None:
        port = free_port()
        self._forks = forks
        self.url = f"http://{host}:{port}"
        self.client = Client(self.url)
        how = launch(
            model,
            port,
            page_size=page_size,
            tp=tp,
            max_total_tokens=max_total_tokens,
            extra=extra,
            env=env,
            python=python,
            host=host,
        )
        super().__init__(f"server {self.url}", [*prefix, *how.argv], env=how.env, log=log)

    def _launch(self, log: int) -> Process:
        if self._forks is None:
            return super()._launch(log)
        return self._forks.start(self._argv, self._env, log)

    def wait_ready(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Block until the server answers requests.

        Raises:
            ProcessFailedError: it ended, or was not ready in time.

        """
        self.wait_until(self.client.is_healthy, timeout_s=timeout_s)

    def stop(self, *, grace_s: float = 10.0) -> None:
        """Stop the server; see `ManagedProcess.stop`.

        Also removes its files in shared memory: SGLang 0.5.23 leaves load slots and semaphores
        behind.
        """
        left = self._shared_memory()
        super().stop(grace_s=grace_s)
        _remove(left)

    def kill(self) -> None:
        """Kill the server, as a crash would, and remove its files in shared memory. Idempotent."""
        with contextlib.suppress(ProcessFailedError, ProcessLookupError):
            os.killpg(self.pid, signal.SIGSTOP)  # kill it first, so that it creates no more files
        left = self._shared_memory()
        super().kill()
        _remove(left)

    def _shared_memory(self) -> set[Path]:
        with contextlib.suppress(ProcessFailedError):
            return shared_memory_of(self.pid)
        return set()

    def __enter__(self) -> "CpuServer":
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self


def _remove(files: set[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
