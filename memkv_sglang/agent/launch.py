"""Starting an agent that outlives its starter."""

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
"""Seconds for an agent to get ready: without a journal it reads the footers of perhaps millions of
pages, some 15,000 a second. One that hangs is ended."""

MODULE = "memkv_sglang.agent"
"""What `python -m` runs."""

READY = "ready"
"""What the agent says once clients are served; anything else is why not."""


class StartError(Exception):
    """The agent did not get ready. The text is its own line, or says where its log is."""


def start_agent(config: Config, module: str = MODULE) -> bool:
    """Start an agent unless one serves the socket; returns whether this call did.

    However many processes call this at a time, one agent is started. Blocks until it is ready.
    It logs to `agent.log` beside the socket, which moves to `agent.log.1` once it is long. Raises
    `StartError` and `ConfigError`.
    """
    path = socket_path(config.agent)
    with locked_directory(path) as lock:
        if serving_peer(path) is not None:
            return False
        log = agent_log(path)
        outcome = _spawn(config, module, lock, log)
    if outcome != READY:
        raise StartError(outcome or f"the agent ended without a word; see {log}")
    return True


def _spawn(config: Config, module: str, lock: int, log: Path) -> str:
    """Return the agent's line, or nothing if it ended without one."""
    # -P: modules do not come from whatever directory the starter stands in.
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
            # A server's directory for the metrics of its own processes; the agent has its own.
            env={k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"},
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
