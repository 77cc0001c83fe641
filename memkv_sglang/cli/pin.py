"""`memkv pin`, `memkv unpin` and `memkv pins`: protect prompts from removal."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from memkv_sglang.cli.options import Duration, SettingsCommand
from memkv_sglang.cli.output import human_date, human_time, make_console, print_json
from memkv_sglang.cli.prompts import Prompt, prompt_options
from memkv_sglang.cli.shards import prefixed
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.page import Chain

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio import MinioTier
    from memkv_sglang.tiers.minio.retention.pins import StoredPin

LOOKUP_PAGES = 4096
"""Number of pages per presence check."""

LOOKUP_SECONDS = 30.0
"""Seconds for a presence check."""

NOTE_LIMIT = 200
"""Maximum characters of a note."""

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
    help="How long to keep the pages.",
)
@click.option("--note", default="", help="A note, which `memkv pins` shows.")
def pin(loaded: LoadedConfig, prompt: Prompt, seconds: float, note: str) -> None:
    """Keep a prompt's pages in MinIO and on every node's disk for a limited time.

    Pages that are not stored yet are kept as soon as they are stored. To extend a pin, pin the
    prompt again. Agents notice a pin within half a minute.
    """
    from memkv_sglang.cli.listing.minio import open_buckets
    from memkv_sglang.tiers.minio.retention.pins import Pin

    if len(note) > NOTE_LIMIT or not note.isprintable():
        raise click.UsageError(f"--note: use one line of at most {NOTE_LIMIT} characters")
    with open_buckets(loaded.config.minio) as opened:
        tiers = list(opened.values())
        chains = prompt.chains(tiers)
        made = Pin(
            namespaces=[chain.namespace.hex() for chain in chains],
            hashes=[page.hex() for page in chains[0].hashes],
            seconds=seconds,
            note=note,
        )
        for tier in tiers:
            tier.retention.pins().add(made)
        click.echo(
            f"{made.name} keeps {len(made.hashes)} pages in {len(made.namespaces)} namespaces for "
            f"{human_time(seconds)}"
        )
        _wait_for_collection(tiers, loaded)
        for line in _absent(tiers, chains):
            click.echo(f"warning: {line}", err=True)


def _wait_for_collection(tiers: Sequence["MinioTier"], loaded: LoadedConfig) -> None:
    """If a collection is removing pages, wait until it has taken the pin into account."""
    from memkv_sglang.tiers.minio.retention.shard_pass import REMOVE_SECONDS

    looks = [tier.retention.collector(loaded.config.collector).look() for tier in tiers]
    if any(look.current.phase == "remove" for look in looks):
        click.echo("a collection is running; waiting until it has read the pin", err=True)
        time.sleep(REMOVE_SECONDS)


def _absent(tiers: Sequence["MinioTier"], chains: Sequence[Chain]) -> list[str]:
    """Return a warning for each chain with pages that no bucket has."""
    lines = []
    for chain in chains:
        keys = chain.keys()
        present: list[bool] = []
        for first in range(0, len(keys), LOOKUP_PAGES):
            batch = keys[first : first + LOOKUP_PAGES]
            deadline = time.monotonic() + LOOKUP_SECONDS
            held = [tier.present(batch, deadline) for tier in tiers]
            present += map(any, zip(*held, strict=True))
        if not all(present):
            first = present.index(False)
            lines.append(
                f"namespace {chain.namespace.hex()}: {present.count(False)} of {len(keys)} pages "
                f"are not in the bucket, starting with page {first} ({keys[first].hash.hex()}); "
                "they are kept once they are stored"
            )
    return lines


@click.command(cls=SettingsCommand, shown=("minio",), short_help="Remove a pin.")
@click.argument("name")
def unpin(loaded: LoadedConfig, name: str) -> None:
    """Remove a pin. `memkv pins` shows its NAME."""
    from memkv_sglang.cli.listing.minio import open_buckets

    if not _NAME.fullmatch(name):
        raise click.UsageError(
            f"NAME: {name[:40]!r} is not the name of a pin; `memkv pins` lists them"
        )
    with open_buckets(loaded.config.minio) as tiers:
        removed = [tier.retention.pins().remove(name) for tier in tiers.values()]
        if not any(removed):
            raise click.ClickException(f"no pin {name[:40]!r}; `memkv pins` lists them")


@click.command(cls=SettingsCommand, shown=("minio",), short_help="List the pinned prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pins(loaded: LoadedConfig, as_json: bool) -> None:
    """List the pinned prompts and when their pins end."""
    from memkv_sglang.cli.listing.minio import open_buckets

    by_name: dict[str, StoredPin] = {}
    with open_buckets(loaded.config.minio) as tiers:
        for shard, tier in tiers.items():
            everything, odd = tier.retention.pins().report()
            by_name |= {found.name: found for found in everything if found.left > 0}
            if odd.objects:
                line = f"{odd.text}; remove them or pin again"
                click.echo(f"warning: {prefixed(shard, line)}", err=True)
    stored = sorted(by_name.values())
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
