"""The agent's socket, and the agent if it runs."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from memkv_sglang import __version__
from memkv_sglang.cli.checks.finding import Finding, split_problem
from memkv_sglang.cli.output import human_time
from memkv_sglang.cli.running import CONNECT_LIMIT
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import Config


def check_agent(config: Config) -> Iterator[Finding]:
    """Look at the socket, and ask who serves it; starts nothing."""
    from memkv_sglang.agent.listener import serving_peer
    from memkv_sglang.agent.paths import socket_path

    try:
        path = socket_path(config.agent)
    except ConfigError as error:
        yield split_problem("socket", str(error))
        return
    yield Finding("ok", "socket", str(path))
    if serving_peer(path) is None:
        yield Finding("ok", "agent", "not running; `memkv agent` or the first server starts it")
    else:
        yield _ask(config, path)


def _ask(config: Config, path: Path) -> Finding:
    from memkv_sglang.client.client import AgentClient

    with closing(AgentClient(config, start=False)) as client:
        report = client.status() if client.wait(CONNECT_LIMIT) else None
        problem = client.problem
    if report is None:
        advice = "restart it; its log is on its stderr, or in agent.log beside the socket"
        return Finding("FAIL", "agent", f"{path} is served, but not for us: {problem}", advice)
    agent = report.agent
    detail = f"version {agent.version}, pid {agent.pid}, up {human_time(agent.uptime)}"
    if agent.version != __version__:
        return Finding("warn", "agent", detail, f"restart it to run version {__version__}")
    return Finding("ok", "agent", detail)
