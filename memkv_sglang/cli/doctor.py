"""`memkv doctor`."""

import signal
import sys
import time
from collections.abc import Iterable, Iterator

import click

from memkv_sglang.cli.checks.agent import check_agent
from memkv_sglang.cli.checks.bucket import check_bucket
from memkv_sglang.cli.checks.compiled import check_compiled
from memkv_sglang.cli.checks.conflict import check_conflict
from memkv_sglang.cli.checks.disk import check_disk
from memkv_sglang.cli.checks.disk_speed import check_disk_speed
from memkv_sglang.cli.checks.endpoint import check_endpoints
from memkv_sglang.cli.checks.files import check_files, check_http_files
from memkv_sglang.cli.checks.limits import check_limits
from memkv_sglang.cli.checks.memory import check_memory
from memkv_sglang.cli.checks.pins import check_pins
from memkv_sglang.cli.fleet import (
    is_token,
    make_token,
    read_for_fleet,
    remove_for_fleet,
    write_for_fleet,
)
from memkv_sglang.cli.options import Duration, SettingsCommand
from memkv_sglang.cli.output import human_time, make_console, print_json, print_line
from memkv_sglang.cli.shards import bucket_configs, prefixed, shard_option
from memkv_sglang.config.environment import check_any_tier, check_ca_file
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.config.shards import has_minio
from memkv_sglang.finding import Finding, split_problem

_STYLES = {"ok": "green", "skip": "cyan", "warn": "yellow", "FAIL": "bold red"}


@click.command(
    cls=SettingsCommand,
    shown=("nvme", "minio"),
    short_help="Check settings, disk, memory, MinIO and agent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--disk-speed", is_flag=True, help="Also measure each disk, for four seconds.")
@click.option(
    "--fleet",
    is_flag=True,
    help="Instead, make this node's agent store a page, and wait for other nodes to load it.",
)
@click.option(
    "--fleet-read",
    metavar="TOKEN",
    help="Instead, make this node's agent load the page that `doctor --fleet` on another node has "
    "stored. That command prints the TOKEN.",
)
@click.option(
    "--wait",
    type=Duration("1s", "1d"),
    default="10m",
    metavar="TIME",
    show_default=True,
    help="How long --fleet waits for the other nodes.",
)
@shard_option
def doctor(
    loaded: LoadedConfig,
    as_json: bool,
    disk_speed: bool,
    fleet: bool,
    fleet_read: str | None,
    wait: float,
    shard: str | None,
) -> int:
    """Check settings, disk, memory, MinIO and agent, and suggest fixes.

    The exit status is 1 if a check fails. Nothing is changed; test objects are removed.

    To check that nodes share pages, run `memkv doctor --fleet` on one node. It prints a command;
    run that on every other node. Both commands use the node's running agent, as servers do.
    """
    if fleet and fleet_read is not None:
        raise click.UsageError("--fleet and --fleet-read cannot be combined; run them on two nodes")
    if fleet:
        return _write_for_fleet(loaded, as_json, wait)
    if fleet_read is not None:
        if not is_token(fleet_read):
            raise click.UsageError("--fleet-read: not a token that `memkv doctor --fleet` prints")
        return _show(iter([read_for_fleet(loaded.config, fleet_read)]), as_json)
    return _show(diagnose(loaded, shard, disk_speed=disk_speed), as_json)


def _show(findings: Iterator[Finding], as_json: bool) -> int:
    """Print findings and return the exit status."""
    if as_json:
        found = list(findings)
        print_json([finding._asdict() for finding in found])
    else:
        found = _print_as_found(findings)
    return int(any(finding.level == "FAIL" for finding in found))


def _write_for_fleet(loaded: LoadedConfig, as_json: bool, wait: float) -> int:
    """Make the agent store a page. Remove it after `wait` seconds or when interrupted."""
    token = make_token()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also remove the page after SIGTERM
    try:
        status = _show(iter([write_for_fleet(loaded.config, token)]), as_json)
        if status == 0:
            sys.stdout.flush()
            print_line(f"waiting {human_time(wait)}; Ctrl-C removes the page earlier", err=True)
            time.sleep(wait)
    except KeyboardInterrupt:
        status = 0  # Ctrl-C is the usual end
    finally:
        remove_for_fleet(loaded.config, token)
    return status


def diagnose(
    loaded: LoadedConfig, shard: str | None = None, *, disk_speed: bool = False
) -> Iterator[Finding]:
    """Run the checks, local ones first, and yield their findings. `shard` selects one shard."""
    yield from _check_settings(loaded)
    yield from check_conflict()
    yield from check_compiled()
    yield from check_disk(loaded)
    if disk_speed:
        yield from check_disk_speed(loaded.config.nvme)
    yield from check_limits(loaded.config)
    yield from check_memory()
    yield from check_http_files(loaded.config.agent)
    yield from check_agent(loaded)
    try:
        check_ca_file(loaded)
    except ConfigError as error:
        yield split_problem("ca_file", str(error))
        return
    if not has_minio(loaded.config.minio):
        yield Finding("ok", "MinIO", "no MinIO tier is configured")
        return
    for name, config in bucket_configs(loaded.config.minio, shard).items():
        for finding in _check_minio(config, loaded.config.collector):
            yield finding._replace(detail=prefixed(name, finding.detail))


def _check_minio(config: MinioConfig, collector: CollectorConfig) -> Iterator[Finding]:
    """Check one bucket, its server and its files."""
    files = list(check_files(config))
    yield from files
    if any(finding.level == "FAIL" for finding in files):
        return
    servers = list(check_endpoints(config))
    yield from servers
    if all(finding.level == "FAIL" for finding in servers if finding.what == "MinIO"):
        return
    bucket = []
    for finding in check_bucket(config, collector):
        bucket.append(finding)
        yield finding
    if all(finding.level in ("ok", "skip") for finding in bucket):
        yield from check_pins(config)


def _check_settings(loaded: LoadedConfig) -> Iterator[Finding]:
    try:
        check_any_tier(loaded)
    except ConfigError as error:
        yield split_problem("settings", str(error))
    else:
        given = len(loaded.origins)
        yield Finding("ok", "settings", f"valid ({given} set); `memkv config` shows them")


def _print_as_found(findings: Iterable[Finding]) -> list[Finding]:
    from rich.table import Table
    from rich.text import Text

    console, printed = make_console(), []
    for finding in findings:
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column(width=5)
        line.add_column(width=12)
        line.add_column(overflow="fold")
        line.add_row(
            Text(finding.level, _STYLES[finding.level]),
            Text(finding.what, "bold"),
            finding.detail,
        )
        if finding.advice:
            line.add_row("", "", f"-> {finding.advice}")
        console.print(line)
        printed.append(finding)
    return printed
