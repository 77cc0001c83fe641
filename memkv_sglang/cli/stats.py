"""`memkv stats`."""

import os
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from memkv_sglang.cli.options import Duration, SettingsCommand
from memkv_sglang.cli.output import human_size, human_time, make_console, print_json
from memkv_sglang.cli.running import running_agent
from memkv_sglang.cli.scrape import Samples, parse_metrics
from memkv_sglang.config.load import LoadedConfig

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from memkv_sglang.agent.protocol import StatusReport
    from memkv_sglang.agent.settings import RunningSettings
    from memkv_sglang.client.client import AgentClient

OPERATIONS = {"lookup": "found", "load": "loaded", "spill": "stored"}
"""A tier's operations, each with the result that means success for a page."""

_STATES = {"": "working", None: "opening"}

_TEXTS = ("tier", "shard", "state", "breaker", "call", "directory")
"""Columns that do not hold numbers."""


@click.command(cls=SettingsCommand, shown=("agent",))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every metric.")
@click.option("--watch", is_flag=True, help="Show the figures again every --interval until Ctrl-C.")
@click.option(
    "--interval",
    type=Duration("100ms", "1d"),
    default="2s",
    metavar="TIME",
    show_default=True,
    help="Time between two refreshes of --watch.",
)
def stats(loaded: LoadedConfig, as_json: bool, watch: bool, interval: float) -> None:
    """Show the agent's tiers, traffic, saved time and settings."""
    if as_json and watch:
        raise click.UsageError("--json and --watch cannot be combined")
    with running_agent(loaded.config) as client:
        if as_json:
            report, samples = _fetch(client)
            status = {"agent": report.agent, "engine": report.engine}
            settings = _fetch_settings(client)
            print_json(
                {
                    **msgspec.to_builtins(status),
                    "settings": settings.shown(),
                    "difference": _difference(settings, loaded),
                    "metrics": samples.as_list(),
                }
            )
        elif watch:
            _watch(client, interval)
        else:
            settings = _fetch_settings(client)
            make_console().print(_view(*_fetch(client)), "", _settings(settings, loaded))


def _fetch(client: "AgentClient") -> tuple["StatusReport", Samples]:
    report = client.status()
    if report is None:
        raise click.ClickException(f"the agent did not respond ({client.problem})")
    metrics = client.metrics()
    if metrics is None:
        raise click.ClickException(f"the agent sent no metrics ({client.problem})")
    return report, parse_metrics(metrics, "the agent")


def _fetch_settings(client: "AgentClient") -> "RunningSettings":
    settings = client.settings()
    if settings is None:
        raise click.ClickException(f"the agent did not report its settings ({client.problem})")
    return settings


def _difference(settings: "RunningSettings", loaded: LoadedConfig) -> str:
    """Return the first setting that differs from the agent's, or "" if none does."""
    difference = settings.first_difference(loaded.config, os.environ, loaded.origins)
    return str(difference or "")


def _settings(settings: "RunningSettings", loaded: LoadedConfig) -> "Text":
    from rich.text import Text

    lines = [f"  {key} = {value}" for key, value in settings.shown().items()]
    if difference := _difference(settings, loaded):
        lines.append(f"different here: {difference}")
    return Text("\n".join(["agent settings that differ from the defaults", *lines]))


def _watch(client: "AgentClient", interval: float) -> None:
    from rich.live import Live

    console = make_console()
    while not console.is_terminal:  # without a terminal, print the views one after the other
        console.print(_view(*_fetch(client)), "")
        time.sleep(interval)
    with Live(_view(*_fetch(client)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_view(*_fetch(client)), refresh=True)


def _view(report: "StatusReport", samples: Samples) -> "Group":
    from rich.console import Group

    agent, engine = report.agent, report.engine
    found = samples.total("memkv_lookup_pages_total", found="yes")
    asked = samples.total("memkv_lookup_pages_total")
    dropped = samples.total("memkv_upload_dropped_pages_total")
    return Group(
        f"agent {agent.version}, pid {agent.pid}, up {human_time(agent.uptime)}",
        f"  socket  {agent.socket}",
        f"  log     {agent.log or 'its stderr'}",
        f"  metrics {agent.metrics_url}",
        f"  clients {agent.sessions}, pools {agent.pools} ({human_size(agent.pool_bytes)})",
        "",
        _tiers(report),
        *_disks(report),
        *_shards(report),
        *_problems(report),
        "",
        _operations(report, samples),
        "",
        f"looked up {asked:.0f} pages, {_share(found, asked)} found",
        f"prefill saved: {_savings(report, samples)}",
        f"upload queue {engine.queue_pages} pages ({human_size(engine.queue_bytes)}), "
        f"dropped {dropped:.0f}; circuit breaker for MinIO: {engine.breaker}",
    )


def _tiers(report: "StatusReport") -> "Table":
    table = _table("tier", "state", "pages", "stored", "capacity", "used", "evicted")
    for tier in report.engine.tiers:
        counts = (
            tier.capacity is not None or tier.pages > 0
        )  # no node counts the pages of the shared tier
        table.add_row(
            tier.name,
            _STATES.get(tier.problem, "failing"),
            str(tier.pages) if counts else "-",
            human_size(tier.bytes) if counts else "-",
            human_size(tier.capacity) if tier.capacity else "-",
            _share(tier.bytes, tier.capacity or 0),
            str(tier.evicted),
        )
    return table


def _disks(report: "StatusReport") -> "list[Table | str]":
    """Return a table of the disks if there are several, else nothing."""
    disks = [disk for tier in report.engine.tiers for disk in tier.disks]
    if len(disks) < 2:
        return []
    table = _table("state", "pages", "stored", "capacity", "used", "evicted", "directory")
    for directory, problem, usage in disks:
        capacity = usage.capacity or 0
        table.add_row(
            _STATES.get(problem, "failing"),
            str(usage.pages),
            human_size(usage.bytes),
            human_size(capacity),
            _share(usage.bytes, capacity),
            str(usage.evicted),
            directory,
        )
    return ["", table]


def _shards(report: "StatusReport") -> "list[Table]":
    """Return a table of the shards if there are any, else nothing."""
    shards = report.engine.shards
    if not shards:
        return []
    table = _table("shard", "state", "breaker", "pages", "stored", "capacity", "used", "evicted")
    for shard in shards:
        table.add_row(
            shard.name,
            _STATES.get(shard.problem, "failing"),
            shard.breaker,
            str(shard.pages),
            human_size(shard.bytes),
            human_size(shard.capacity) if shard.capacity else "-",
            _share(shard.bytes, shard.capacity or 0),
            str(shard.evicted),
        )
    return [table]


def _problems(report: "StatusReport") -> "list[Text]":
    from rich.text import Text

    return [
        Text(f"{tier.name} is failing: {tier.problem}")
        for tier in report.engine.tiers
        if tier.problem
    ]


def _savings(report: "StatusReport", samples: Samples) -> str:
    """Return the tokens that servers did not have to compute, and the time they saved, by tier."""
    return ", ".join(
        f"{samples.total('memkv_saved_prefill_tokens_total', tier=tier.name):,.0f} tokens "
        f"({human_time(samples.total('memkv_saved_prefill_seconds_total', tier=tier.name))}) "
        f"from {tier.name}"
        for tier in report.engine.tiers
    )


def _operations(report: "StatusReport", samples: Samples) -> "Table":
    table = _table("tier", "call", "pages", "succeeded", "corrupt", "failed", "moved", "mean time")
    for tier in report.engine.tiers:
        for operation, success in OPERATIONS.items():
            labels: dict[str, Any] = {"tier": tier.name, "operation": operation}
            pages = samples.total("memkv_pages_total", **labels)
            calls = samples.total("memkv_call_duration_seconds_count", **labels)
            seconds = samples.total("memkv_call_duration_seconds_sum", **labels)
            table.add_row(
                tier.name,
                operation,
                f"{pages:.0f}",
                _share(samples.total("memkv_pages_total", result=success, **labels), pages),
                f"{samples.total('memkv_pages_total', result='corrupt', **labels):.0f}",
                f"{samples.total('memkv_pages_total', result='failed', **labels):.0f}",
                human_size(samples.total("memkv_bytes_total", **labels)),
                human_time(seconds / calls) if calls else "-",
            )
    return table


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXTS else "right")
    return table


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
