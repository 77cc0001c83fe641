"""SGLang servers on a plain CPU, as demos, tests and benchmarks start them."""

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
from sglang_cpu_platform.process import ManagedProcess, ProcessFailedError, shared_memory_of

HOST = "127.0.0.1"
PORTS = range(10_000, 30_000)
"""Below those that Linux picks itself (`ip_local_port_range`: 32768 to 60999)."""
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
) -> Launch:
    """Say how to start an SGLang server on a plain CPU.

    Args:
        model: directory of the model.
        port: of 127.0.0.1.
        page_size: tokens a page; None leaves the choice to SGLang or a plugin.
        tp: tensor-parallel ranks, each bound to one core.
        max_total_tokens: size of the device pool in tokens; HiCache's host pool has twice that.
        extra: more arguments of `sglang.launch_server`; they win over those given here.
        env: more of the environment; it wins likewise.
        python: interpreter of the environment in which SGLang is installed.

    """
    argv = [
        python, "-m", "sglang.launch_server",
        "--model-path", str(model),
        "--served-model-name", "tiny",
        "--host", HOST,
        "--port", str(port),
        "--tp-size", str(tp),
        # "auto" would make bfloat16 of float32: greedy texts then differ between runs.
        "--dtype", "float32",
        "--max-total-tokens", str(max_total_tokens),
        # SGLang's guess comes from the sizes of GPUs; the line above is what counts.
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
        # More threads than cores only wait for each other.
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        forking.VARIABLE: "1",
    }
    if tp > 1:
        settings["SGLANG_CPU_OMP_THREADS_BIND"] = _one_core_a_rank(tp)
    return Launch([*argv, *extra], {**os.environ, **settings, **(env or {})})


def _one_core_a_rank(ranks: int) -> str:
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on now.

    Not one of those that the kernel picks itself: it would give one away to the next connection
    that is made, while the server takes its time to start.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((HOST, port))
            return port
    raise OSError("no port is free")


class CpuServer(ManagedProcess):
    """A server that runs for the length of a `with` block, ready when the block begins.

    To start several at once, call `start` on each, then `wait_ready` on each, and `stop`.
    Arguments as of `launch`, on a free port.
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
    ) -> None:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
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
        )
        super().__init__(f"server {self.url}", how.argv, env=how.env, log=log)

    def wait_ready(self, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Block until the server answers requests.

        Raises:
            ProcessFailedError: it ended, or was not ready in time.

        """
        self.wait_until(self.client.is_healthy, timeout_s=timeout_s)

    def stop(self, *, grace_s: float = 10.0) -> None:
        """End it in good order, as `ManagedProcess.stop` does.

        Removes what it has in shared memory, as `kill` does: SGLang 0.5.23 leaves its load slots
        and semaphores there.
        """
        left = self._shared_memory()
        super().stop(grace_s=grace_s)
        _remove(left)

    def kill(self) -> None:
        """End it at once, as a crash would; idempotent."""
        with contextlib.suppress(ProcessFailedError, ProcessLookupError):
            os.killpg(self.pid, signal.SIGSTOP)  # so that nothing new appears meanwhile
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
