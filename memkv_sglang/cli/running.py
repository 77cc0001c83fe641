"""Connect to the running agent."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from memkv_sglang.config.schema import Config

if TYPE_CHECKING:
    from memkv_sglang.client.client import AgentClient

CONNECT_LIMIT = 2.0
"""Seconds for a running agent to respond."""


@contextmanager
def running_agent(config: Config) -> Iterator["AgentClient"]:
    """Connect to the agent. Raises `click.ClickException` if none is running; never starts one."""
    from memkv_sglang.agent.listener import serving_peer
    from memkv_sglang.agent.paths import socket_path
    from memkv_sglang.client.client import AgentClient

    path = socket_path(config.agent)
    if serving_peer(path) is None:
        raise click.ClickException(
            f"no agent on {path}; start one with `memkv agent`, or set its socket with "
            "--agent-socket"
        )
    client = AgentClient(config, start=False)
    try:
        if not client.wait(CONNECT_LIMIT):
            raise click.ClickException(
                f"the agent on {path} does not respond ({client.problem}); restart it"
            )
        yield client
    finally:
        client.close()
