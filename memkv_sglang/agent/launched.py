"""The agent's side of `launch`: report the outcome to the starter, then detach from it."""

import os
import sys

import msgspec

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.agent.log_file import watch_log
from memkv_sglang.agent.main import EngineBuilder, run
from memkv_sglang.agent.paths import agent_log, socket_path
from memkv_sglang.agent.placement import use_whole_machine
from memkv_sglang.config.schema import Config

READY = "ready"
"""Line for the starter once clients are served; any other line is an error message."""


def run_launched(text: bytes, lock: int, build: EngineBuilder = build_engine) -> int:
    """Run the agent with the configuration in `text` (JSON); return the exit status.

    `lock` is the descriptor that holds the lock on the socket's directory, shared with the starter.
    The outcome is printed to stdout, which is then redirected to stderr, the log.
    """

    def report(problem: str) -> None:
        print(problem or READY, flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, sys.stdin.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        os.close(null)
        os.close(lock)

    use_whole_machine()
    config = msgspec.json.decode(text, type=Config)
    watch_log(agent_log(socket_path(config.agent)))
    return run(config, locked=True, report=report, build=build)
