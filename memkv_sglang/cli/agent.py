"""`memkv agent`."""

from typing import TYPE_CHECKING

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import Config
from memkv_sglang.config.settings import sections

if TYPE_CHECKING:
    from memkv_sglang.agent.lifetime import LifetimeMemory


@click.command(
    cls=SettingsCommand,
    shown=tuple(sections()),
    short_help="Run this node's agent in the foreground.",
)
@click.option(
    "--supervise",
    is_flag=True,
    help="Run the agent under a supervisor, which kills a hung agent for servers that cannot. "
    "Servers in other containers need it.",
)
def agent(loaded: LoadedConfig, supervise: bool) -> int:
    """Run this node's agent in the foreground until SIGTERM or Ctrl-C. It logs to stderr.

    Exit status 2 means that the configuration is invalid, so a restart will not help.
    """
    check_environment(loaded)
    if supervise:
        return _supervise(loaded.config)
    from memkv_sglang.agent.main import run

    return run(loaded.config)


def _supervise(config: Config) -> int:
    from memkv_sglang.agent.paths import socket_path
    from memkv_sglang.agent.supervisor import supervise

    def run_agent(lifetime: "LifetimeMemory") -> int:
        from memkv_sglang.agent.main import run  # imported here, so that the supervisor stays small

        return run(config, lifetime=lifetime)

    return supervise(socket_path(config.agent), run_agent)
