"""`memkv pin`, `memkv unpin` and `memkv pins`: prompts that no collector removes."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from memkv_sglang.cli.options import Duration, SettingsCommand
from memkv_sglang.cli.output import human_date, human_time, make_console, print_json
from memkv_sglang.cli.prompts import Prompt, demand_bucket, prompt_options
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.page import Chain

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio import MinioTier

ASKED_AT_ONCE = 4096
"""Pages that are asked for in one call."""

ASK_SECONDS = 30.0
"""Longest time for such a call."""

NOTE_LIMIT = 200
"""Characters."""

_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)


@click.command(
    cls=SettingsCommand,
    shown=("minio",),
    short_help="Keep a prompt's pages in MinIO and on every node's disk.",
)
@prompt_options
@click.option(
    "seconds",
    "--for",
    type=Duration("1s", "36500d"),
    default="7d",
    show_default=True,
    metavar="TIME",
    help="How long.",
)
@click.option("--note", default="", help="What for; `memkv pins` shows it.")
def pin(loaded: LoadedConfig, prompt: Prompt, seconds: float, note: str) -> None:
    """Keep a prompt's pages in MinIO and on every node's disk, for a while.

    Pages that are not stored yet are kept once they are. Pinning again renews. Agents learn of it
    within half a minute.
    """
    from memkv_sglang.cli.listing.minio import open_minio
    from memkv_sglang.tiers.minio.retention.pins import Pin

    demand_bucket(loaded.config.minio)
    if len(note) > NOTE_LIMIT or not note.isprintable():
        raise click.UsageError(f"--note: write one line of at most {NOTE_LIMIT} characters")
    with open_minio(loaded.config.minio) as tier:
        chains = prompt.chains(tier)
        made = Pin(
            namespaces=[chain.namespace.hex() for chain in chains],
            hashes=[page.hex() for page in chains[0].hashes],
            seconds=seconds,
            note=note,
        )
        tier.pins().add(made)
        click.echo(
            f"{made.name} keeps {len(made.hashes)} pages in {len(made.namespaces)} namespaces for "
            f"{human_time(seconds)}"
        )
        _let_removals_end(tier, loaded)
        for line in _absent(tier, chains):
            click.echo(f"warning: {line}", err=True)


def _let_removals_end(tier: "MinioTier", loaded: LoadedConfig) -> None:
    """Wait, if a collection goes on, until it has seen the pin before whatever it removes."""
    from memkv_sglang.tiers.minio.retention.collector import Lease
    from memkv_sglang.tiers.minio.retention.collector.collect import REMOVE_SECONDS

    _, records, names = tier.control()
    if Lease(records, names.lease, loaded.config.collector.lease_ttl).state().holder:
        click.echo("a collection goes on; waiting until it has seen the pin", err=True)
        time.sleep(REMOVE_SECONDS)


def _absent(tier: "MinioTier", chains: Sequence[Chain]) -> list[str]:
    """Return a line for each chain of which the bucket does not have every page now."""
    lines = []
    for chain in chains:
        keys = chain.keys()
        there: list[bool] = []
        for first in range(0, len(keys), ASKED_AT_ONCE):
            batch = keys[first : first + ASKED_AT_ONCE]
            there += tier.present(batch, time.monotonic() + ASK_SECONDS)
        if not all(there):
            first = there.index(False)
            lines.append(
                f"namespace {chain.namespace.hex()}: {there.count(False)} of {len(keys)} pages are "
                f"not in the bucket now, the first is page {first} ({keys[first].hash.hex()}); "
                "they are kept once they are stored"
            )
    return lines


@click.command(cls=SettingsCommand, shown=("minio",), short_help="Let a pinned prompt go.")
@click.argument("name")
def unpin(loaded: LoadedConfig, name: str) -> None:
    """Let a pinned prompt go: NAME is what `memkv pins` shows."""
    from memkv_sglang.cli.listing.minio import open_minio

    demand_bucket(loaded.config.minio)
    if not _NAME.fullmatch(name):
        raise click.UsageError(f"NAME: {name[:40]!r} is no pin's name; `memkv pins` lists them")
    with open_minio(loaded.config.minio) as tier:
        if not tier.pins().remove(name):
            raise click.ClickException(f"no pin {name[:40]!r}; `memkv pins` lists them")


@click.command(cls=SettingsCommand, shown=("minio",), short_help="List the pinned prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pins(loaded: LoadedConfig, as_json: bool) -> None:
    """List the pinned prompts, and how long they hold."""
    from memkv_sglang.cli.listing.minio import open_minio

    demand_bucket(loaded.config.minio)
    with open_minio(loaded.config.minio) as tier:
        everything, odd = tier.pins().report()
    stored = [found for found in everything if found.left > 0]
    if odd.objects:
        click.echo(f"warning: {odd.text}; remove them, or pin again", err=True)
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "pages": len(found.hashes),
                    "namespaces": list(found.namespaces),
                    "seconds_left": left,
                    "note": found.note,
                }
                for name, found, left in stored
            ]
        )
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("pin", "pages", "namespaces", "ends", "for"):
        table.add_column(title, overflow="fold")
    now = time.time()
    for name, found, left in stored:
        ends = human_date(now + left)
        table.add_row(name, str(len(found.hashes)), str(len(found.namespaces)), ends, found.note)
    make_console().print(table if stored else "no pins")
