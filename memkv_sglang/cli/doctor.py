"""`memkv doctor`."""

from collections.abc import Iterable, Iterator

import click

from memkv_sglang.cli.checks.agent import check_agent
from memkv_sglang.cli.checks.bucket import check_bucket
from memkv_sglang.cli.checks.compiled import check_compiled
from memkv_sglang.cli.checks.disk import check_disk
from memkv_sglang.cli.checks.endpoint import check_endpoints
from memkv_sglang.cli.checks.files import check_files
from memkv_sglang.cli.checks.memory import check_memory
from memkv_sglang.cli.checks.pins import check_pins
from memkv_sglang.cli.options import SettingsCommand
from memkv_sglang.cli.output import make_console, print_json
from memkv_sglang.config.environment import check_any_tier, check_ca_file
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import LoadedConfig
from memkv_sglang.finding import Finding, split_problem

_STYLES = {"ok": "green", "skip": "cyan", "warn": "yellow", "FAIL": "bold red"}


@click.command(
    cls=SettingsCommand,
    shown=("nvme", "minio"),
    short_help="Check settings, disk, memory, MinIO and agent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(loaded: LoadedConfig, as_json: bool) -> int:
    """Check settings, disk, memory, MinIO and agent, and suggest fixes.

    Exit status 1 if a check fails. Changes nothing: its test object is removed again.
    """
    if as_json:
        findings = list(diagnose(loaded))
        print_json([finding._asdict() for finding in findings])
    else:
        findings = _print_as_found(diagnose(loaded))
    return int(any(finding.level == "FAIL" for finding in findings))


def diagnose(loaded: LoadedConfig) -> Iterator[Finding]:
    """Run the checks, local ones first, and yield their findings."""
    yield from _check_settings(loaded)
    yield from check_compiled()
    yield from check_disk(loaded)
    yield from check_memory()
    yield from check_agent(loaded)
    try:
        check_ca_file(loaded)
    except ConfigError as error:
        yield split_problem("ca_file", str(error))
        return
    files = list(check_files(loaded.config.minio))
    yield from files
    if any(finding.level == "FAIL" for finding in files):
        return
    servers = list(check_endpoints(loaded.config.minio))
    yield from servers
    if all(finding.level == "FAIL" for finding in servers if finding.what == "MinIO"):
        return
    bucket = []
    for finding in check_bucket(loaded.config):
        bucket.append(finding)
        yield finding
    if all(finding.level in ("ok", "skip") for finding in bucket):
        yield from check_pins(loaded.config.minio)


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
