"""Start an agent that outlives this process."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from memkv_sglang.agent.listener import serving_peer
from memkv_sglang.agent.log_file import open_log
from memkv_sglang.agent.paths import agent_log, locked_directory, socket_path
from memkv_sglang.config.schema import Config

START_LIMIT = 300.0
"""Seconds for an agent to become ready; after that it is killed. Without a journal it reads the
footers of up to millions of pages, at about 15,000 per second."""

MODULE = "memkv_sglang.agent"
"""Module that `python -m` runs."""

OF_THE_SERVER = (
    *("LD_PRELOAD", "LD_AUDIT", "PROMETHEUS_MULTIPROC_DIR"),
    *("CUDA_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "TORCH", "PYTORCH_", "TRITON_"),
    *("OMP_", "MKL_", "KMP_", "GOMP_"),
)
"""Prefixes of environment variables for a server's GPUs and threads. The agent does not get them.
"""

READY = "ready"
"""Line that the agent prints once it serves clients; any other line is an error message."""


class StartError(Exception):
    """The agent did not become ready. The message is the agent's own, or names its log."""


def start_agent(config: Config, module: str = MODULE) -> bool:
    """Start an agent unless one already serves the socket; return whether this call started it.

    Blocks until the agent is ready. If several processes call this at once, one agent is started.
    It logs to `agent.log` next to the socket, which is rotated to `agent.log.1`. Raises
    `StartError` and `ConfigError`.
    """
    path = socket_path(config.agent)
    with locked_directory(path) as lock:
        if serving_peer(path) is not None:
            return False
        log = agent_log(path)
        outcome = _spawn(config, module, lock, log)
    if outcome != READY:
        raise StartError(outcome or f"the agent ended before it was ready; see {log}")
    return True


def _spawn(config: Config, module: str, lock: int, log: Path) -> str:
    """Start the agent; return the line that it printed, empty if it ended without one."""
    # -P: do not import modules from the current directory.
    command = [sys.executable, "-P", "-m", module, str(lock)]
    try:
        log_descriptor = open_log(log)
    except OSError as error:
        raise StartError(f"cannot write {log}: {error.strerror}; remove it") from None
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_descriptor,
            pass_fds=[lock],
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith(OF_THE_SERVER)},
        )
    except OSError as error:
        raise StartError(f"cannot run {sys.executable}: {error.strerror}") from None
    finally:
        os.close(log_descriptor)
    assert process.stdin is not None and process.stdout is not None
    with process, process.stdout as stdout:
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(msgspec.json.encode(config))
        try:
            return _read_line(stdout.fileno(), time.monotonic() + START_LIMIT)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise StartError(
                f"the agent was not ready after {START_LIMIT:.0f} s; see {log}"
            ) from None


def _read_line(descriptor: int, deadline: float) -> str:
    text = b""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while not text.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(descriptor, 4096)
        if not piece:
            break
        text += piece
    return text.decode(errors="replace").strip()
