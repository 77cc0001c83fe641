"""`memkv gc`."""

from typing import TYPE_CHECKING, Any

import click
import msgspec

from memkv_sglang.cli.options import SettingsCommand, timeout_option
from memkv_sglang.cli.output import PhaseProgress, human_size, make_progress, print_json
from memkv_sglang.cli.shards import bucket_configs, prefixed, shard_option
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import CollectorConfig, MinioConfig

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.retention.collector import Collection


@click.command(
    cls=SettingsCommand,
    shown=("minio", "collector"),
    short_help="Remove the least recently used pages above the limits from MinIO.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only show what would be removed. The index is updated nevertheless.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON. With shards, it is a list.")
@timeout_option
@shard_option
def gc(
    loaded: LoadedConfig, dry_run: bool, as_json: bool, timeout: float | None, shard: str | None
) -> None:
    """Remove pages above the limits from MinIO, least recently used first.

    Agents do this themselves if `collector.capacity` or `collector.max_age` is set. This command
    first ends a collection that is under way. If it has to wait for another node, it names the node
    after 30 s. After choosing the pages, it waits for half of `collector.interval`, so that all
    nodes can report which of them they use. It keeps pinned pages. The exit status is 1 if pinned
    pages alone exceed the limits.
    """
    config = loaded.config
    check_environment(loaded)
    buckets = bucket_configs(config.minio, shard)
    if not dry_run and not config.collector.capacity and not config.collector.max_age:
        raise ConfigError(
            "collector.capacity, collector.max_age: both are 0, so there is no limit; set one, "
            "e.g. --collector-capacity 2TiB"
        )
    collections = {
        name: _collect(one, name, config.collector, timeout, dry_run=dry_run)
        for name, one in buckets.items()
    }
    if as_json:
        reports = [
            {**({"shard": name} if name else {}), **_as_json(found), "dry_run": dry_run}
            for name, found in collections.items()
        ]
        print_json(reports if config.minio.shards else reports[0])
    else:
        for name, found in collections.items():
            _print(found, name, dry_run=dry_run)
    if not all(found.satisfied for found in collections.values()):
        raise click.ClickException(
            "pinned pages exceed collector.capacity; unpin some (see `memkv pins`), or raise it"
        )


def _collect(
    config: MinioConfig,
    shard: str,
    limits: CollectorConfig,
    timeout: float | None,
    *,
    dry_run: bool,
) -> "Collection":
    """Collect one bucket. Warn if it is versioned."""
    from memkv_sglang.cli.listing.minio import open_minio

    with open_minio(config) as tier, make_progress() as progress:
        shown = PhaseProgress(progress, timeout)
        support = tier.access.measured_support()
        collector = tier.retention.collector(limits, support.conditions)
        collection = collector.collect(shown.step, dry_run=dry_run)
    if support.versioned:
        line = (
            "warning: the bucket is versioned, so removing pages frees no space; run `memkv bucket "
            "setup` for advice"
        )
        click.echo(prefixed(shard, line), err=True)
    return collection


def _as_json(collection: "Collection") -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(collection.report)
    return found


def _print(collection: "Collection", shard: str, *, dry_run: bool) -> None:
    report = collection.report
    if shard:
        click.echo(f"shard {shard}")
    verb = "would remove" if dry_run else "removed"
    click.echo(f"{verb}: {report.removed_pages} pages, {human_size(report.removed_bytes)}")
    click.echo(f"remaining: {report.pages} pages, {human_size(report.bytes)}")
    if report.kept_pages:
        click.echo(f"pinned: {report.kept_pages} pages")
