"""`memkv agent`."""

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.settings import sections


@click.command(
    cls=SettingsCommand,
    shown=tuple(sections()),
    short_help="Run this node's agent in the foreground.",
)
def agent(loaded: LoadedConfig) -> int:
    """Run this node's agent in the foreground until SIGTERM or Ctrl-C. It logs to stderr.

    Exit status 2 means that the configuration is wrong, so a restart will not help.
    """
    check_environment(loaded)
    from memkv_sglang.agent.main import run

    return run(loaded.config)
