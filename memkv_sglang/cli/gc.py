"""`memkv gc`."""

from typing import TYPE_CHECKING

import click
import msgspec

from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import human_size, make_progress, print_json
from memkv_sglang.config.environment import check_environment
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from memkv_sglang.tiers.minio.retention.collector import Collection, Collector, Lease


@click.command(
    cls=SettingsCommand,
    shown=("minio", "collector"),
    short_help="Remove the least recently used pages above the limits from MinIO.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(loaded: LoadedConfig, dry_run: bool, as_json: bool) -> None:
    """Remove pages above the limits from MinIO, least recently used first.

    Agents do this themselves if `collector.capacity` or `collector.max_age` is set. Only one
    collection runs at a time. Pinned pages are kept. Exit status 1 if another collection is
    running, or if pinned pages alone exceed the limits.
    """
    config = loaded.config
    check_environment(loaded)
    if not config.minio.endpoint:
        raise ConfigError("minio.endpoint: is empty, so there is no bucket; set it")
    if not dry_run and not config.collector.capacity and not config.collector.max_age:
        raise ConfigError(
            "collector.capacity, collector.max_age: both are 0, so there is no limit; set one, "
            "e.g. --collector-capacity 2TiB"
        )
    from memkv_sglang.cli.listing.minio import open_minio

    with open_minio(config.minio) as tier, make_progress() as progress:
        collector, lease = tier.collector(config.collector)
        if dry_run:
            collection = collector.collect(_Shown(progress).step, dry_run=True)
        else:
            collection = _collect(collector, lease, progress)
    if as_json:
        print_json({**msgspec.to_builtins(collection.report), "dry_run": dry_run})
    else:
        _print(collection, dry_run=dry_run)
    if not collection.satisfied:
        raise click.ClickException(
            "pinned pages exceed collector.capacity; unpin some (see `memkv pins`), or raise it"
        )


def _collect(collector: "Collector", lease: "Lease", progress: "Progress") -> "Collection":
    shown = _Shown(progress)

    def step(what: str, done: int, total: int | None) -> None:
        lease.renew()
        shown.step(what, done, total)

    lease.acquire()
    report = None
    try:
        collection = collector.collect(step, hold=lease.renew)
        report = collection.report
    finally:
        lease.release(report)
    if lease.versioned:
        click.echo(
            "warning: the bucket is versioned, so removing pages frees no space; run `memkv bucket "
            "setup` for advice",
            err=True,
        )
    return collection


class _Shown:
    """A progress bar per phase of the collection."""

    def __init__(self, progress: "Progress") -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def step(self, what: str, done: int, total: int | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


def _print(collection: "Collection", *, dry_run: bool) -> None:
    report = collection.report
    verb = "would remove" if dry_run else "removed"
    click.echo(f"{verb}: {report.removed_pages} pages, {human_size(report.removed_bytes)}")
    click.echo(f"remaining: {report.pages} pages, {human_size(report.bytes)}")
    if report.kept_pages:
        click.echo(f"pinned: {report.kept_pages} pages")
