"""`memkv warm`."""

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import make_progress
from memkv_sglang.cli.prompts import Prompt, demand_bucket, prompt_options
from memkv_sglang.cli.running import running_agent
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.page import Chain

PAGES_OF_A_CALL = 64
"""Few enough that a call ends soon, and that progress is seen."""

CALL_SECONDS = 120.0
"""Longest time for a call."""


@click.command(
    cls=SettingsCommand,
    shown=("agent", "minio"),
    short_help="Bring a prompt's pages from MinIO to this node's disk, ahead of traffic.",
)
@prompt_options
def warm(loaded: LoadedConfig, prompt: Prompt) -> None:
    """Bring a prompt's pages from MinIO to this node's disk, ahead of traffic.

    The running agent does it. Exit status 1 if a page was not there, or found no room.
    """
    from memkv_sglang.cli.listing.minio import open_minio

    demand_bucket(loaded.config.minio)
    with open_minio(loaded.config.minio) as tier:
        chains = prompt.chains(tier)
    here, copied, wanted = 0, 0, sum(len(chain.hashes) for chain in chains)
    with running_agent(loaded.config) as agent, make_progress() as progress:
        task = progress.add_task("warm", total=wanted)
        for chain in chains:
            for first in range(0, len(chain.hashes), PAGES_OF_A_CALL):
                part = Chain(chain.namespace, chain.hashes[first : first + PAGES_OF_A_CALL])
                done = agent.warm(part, CALL_SECONDS)
                if done is None:
                    raise click.ClickException(
                        f"the agent did not do it: {agent.refusal or agent.problem or 'too slow'}"
                    )
                here, copied = here + done.present, copied + done.copied
                progress.advance(task, len(part.hashes))
                if done.missing or done.refused:
                    break
    click.echo(f"{copied} pages copied, {here} were there, {wanted - here - copied} are not")
    if here + copied < wanted:
        raise click.exceptions.Exit(1)
