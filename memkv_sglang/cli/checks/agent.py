"""Check the agent's socket, and the agent if it is running."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from memkv_sglang import __version__
from memkv_sglang.cli.output import human_time
from memkv_sglang.cli.running import CONNECT_LIMIT
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.finding import Finding, split_problem

if TYPE_CHECKING:
    from memkv_sglang.agent.protocol import AgentStatus
    from memkv_sglang.agent.settings import RunningSettings
    from memkv_sglang.engine.status import TierStatus


def check_agent(loaded: LoadedConfig) -> Iterator[Finding]:
    """Check the socket and the agent that serves it, without starting one."""
    from memkv_sglang.agent.listener import serving_peer
    from memkv_sglang.agent.paths import socket_path

    try:
        path = socket_path(loaded.config.agent)
    except ConfigError as error:
        yield split_problem("socket", str(error))
        return
    yield Finding("ok", "socket", str(path))
    if serving_peer(path) is None:
        yield Finding(
            "ok", "agent", "not running; `memkv agent` or the first SGLang server starts it"
        )
    else:
        yield from _check_running(loaded, path)


def _check_running(loaded: LoadedConfig, path: Path) -> Iterator[Finding]:
    from memkv_sglang.client.client import AgentClient

    with closing(AgentClient(loaded.config, start=False)) as client:
        report = client.status() if client.wait(CONNECT_LIMIT) else None
        settings = client.settings() if report else None
        problem = client.problem
    if report is None or settings is None:
        advice = "restart it; it logs to its stderr, or to agent.log next to the socket"
        yield Finding("FAIL", "agent", f"the agent on {path} does not respond: {problem}", advice)
        return
    yield _check_version(report.agent)
    yield from map(_check_tier, report.engine.tiers)
    yield _compare(settings, loaded)


def _check_version(agent: "AgentStatus") -> Finding:
    detail = (
        f"version {agent.version}, pid {agent.pid}, up {human_time(agent.uptime)}; it logs to "
        f"{agent.log or 'its stderr'}"
    )
    if agent.version != __version__:
        return Finding("warn", "agent", detail, f"restart it to run version {__version__}")
    return Finding("ok", "agent", detail)


def _check_tier(tier: "TierStatus") -> Finding:
    if tier.problem is None:
        return Finding("ok", "tier", f"the agent is opening {tier.name}")
    if tier.problem:
        detail, _, advice = f"the agent's {tier.name}: {tier.problem}".partition("; ")
        return Finding("FAIL", "tier", detail, advice)
    return Finding("ok", "tier", f"the agent's {tier.name} works")


def _compare(settings: "RunningSettings", loaded: LoadedConfig) -> Finding:
    shown = ", ".join(f"{key} = {value}" for key, value in settings.shown().items())
    difference = settings.first_difference(loaded.config, os.environ, loaded.origins)
    if difference:
        advice = f"restart the agent, or use its settings here: {shown}"
        return Finding("warn", "in force", str(difference), advice)
    return Finding("ok", "in force", shown or "defaults")
