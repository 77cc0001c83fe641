"""`memkv warm`."""

import click

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import make_progress
from memkv_sglang.cli.prompts import Prompt, prompt_options
from memkv_sglang.cli.running import running_agent
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.page import Chain

PAGES_PER_CALL = 64
"""Pages per call: few enough for short calls and visible progress."""

CALL_SECONDS = 120.0
"""Seconds for a call."""


@click.command(
    cls=SettingsCommand,
    shown=("agent", "minio"),
    short_help="Copy a prompt's pages from MinIO to this node's disk.",
)
@prompt_options
def warm(loaded: LoadedConfig, prompt: Prompt) -> None:
    """Copy a prompt's pages from MinIO to this node's disk before requests need them.

    The running agent copies the pages. The exit status is 1 if a page was missing or did not fit.
    """
    from memkv_sglang.cli.listing.minio import open_buckets

    with open_buckets(loaded.config.minio) as tiers:
        chains = prompt.chains(tiers.values())
    here, copied, wanted = 0, 0, sum(len(chain.hashes) for chain in chains)
    with running_agent(loaded.config) as agent, make_progress() as progress:
        task = progress.add_task("warm", total=wanted)
        for chain in chains:
            for first in range(0, len(chain.hashes), PAGES_PER_CALL):
                part = Chain(chain.namespace, chain.hashes[first : first + PAGES_PER_CALL])
                done = agent.warm(part, CALL_SECONDS)
                if done is None:
                    raise click.ClickException(
                        f"the agent failed: {agent.refusal or agent.problem or 'timed out'}"
                    )
                here, copied = here + done.present, copied + done.copied
                progress.advance(task, len(part.hashes))
                if done.missing or done.refused:
                    break
    click.echo(f"{copied} pages copied, {here} already stored, {wanted - here - copied} not copied")
    if here + copied < wanted:
        raise click.exceptions.Exit(1)
