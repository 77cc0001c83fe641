"""`memkv explain`."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from memkv_sglang.cli.options import Duration, SettingsCommand
from memkv_sglang.cli.output import human_time, make_console, print_json
from memkv_sglang.cli.request_times import RequestTimes, log_lines, read_requests
from memkv_sglang.config.load import LoadedConfig

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 10
"""Rows in the table of the slowest requests."""

_NAMES = {"equal_loads": "equal loads"}


@click.command(
    cls=SettingsCommand,
    shown=("agent",),
    short_help="Show where a request's lookup and load time went.",
)
@click.argument("request_id", required=False, default="")
@click.option("--slowest", is_flag=True, help="Explain the slowest request of the last hour.")
@click.option(
    "--last",
    type=Duration("1s", "365d"),
    default="1h",
    metavar="TIME",
    show_default=True,
    help="Period in which --slowest looks for requests.",
)
@click.option(
    "--log",
    "logs",
    multiple=True,
    metavar="FILE",
    help="Log to read; - for stdin. May be repeated.  [default: the agent's log file]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    loaded: LoadedConfig,
    request_id: str,
    slowest: bool,
    last: float,
    logs: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show where the lookup and load time of a request went, from the agent's log.

    REQUEST_ID is SGLang's request id (`rid`). The agent logs requests that wait for 100 ms or
    longer; with `agent.log_requests` = `all`, it logs every request. Its log may be text or JSON. A
    server's log shows how long the server itself waited, if it is JSON (`agent.log_format`).

    An agent that runs as a service logs to the journal:

      journalctl -u memkv-agent -o cat --since -1h | memkv explain --slowest --log -
    """
    if bool(request_id) == slowest:
        raise click.UsageError("give either a REQUEST_ID or --slowest")
    with ExitStack() as stack:
        lines = (line for log in _open_logs(loaded, logs, stack) for line in log_lines(log))
        since = time.time() - last if slowest else 0.0
        requests = read_requests(lines, request=request_id, since=since)
    if not requests:
        raise click.ClickException(_nothing(request_id, last))
    if as_json:
        print_json([{**asdict(one), "seconds": one.seconds} for one in requests[:SHOWN]])
        return
    console = make_console()
    if slowest and len(requests) > 1:
        console.print(_ranking(requests[:SHOWN]), "")
    for part in _explanation(requests):
        console.print(part)


def _open_logs(
    loaded: LoadedConfig, logs: tuple[str, ...], stack: ExitStack
) -> Iterator[IO[bytes]]:
    from memkv_sglang.agent.paths import agent_log, socket_path

    if not logs:
        log = agent_log(socket_path(loaded.config.agent))
        logs = tuple(str(path) for path in (log.with_name(log.name + ".1"), log) if path.exists())
    if not logs:
        raise click.ClickException(
            f"no log at {log}; an agent that no server started logs to its stderr: pass its log "
            "with --log, or pipe it to --log -"
        )
    for name in logs:
        if name == "-":
            yield sys.stdin.buffer
            continue
        try:
            yield stack.enter_context(Path(name).open("rb"))  # noqa: SIM115 - the stack closes it
        except OSError as error:
            raise click.ClickException(f"cannot read {name} ({error.strerror})") from None


def _nothing(request_id: str, last: float) -> str:
    if not request_id:
        return (
            f'no slow request in the last {human_time(last)}; agent.log_requests = "all" logs '
            "fast ones too"
        )
    return (
        f"the log has no request {request_id}: it waited for less than 100 ms, is older than the "
        'log, or agent.log_requests is "none"'
    )


def _ranking(requests: list[RequestTimes]) -> "Table":
    table = _table("request", "client", "began", "waited")
    for one in requests:
        table.add_row(one.request, str(one.client), _moment(one.began), human_time(one.seconds))
    return table


def _explanation(requests: list[RequestTimes]) -> "Iterator[str | Table]":
    """Explain the first request, as seen by the process that waited longest for it."""
    one = requests[0]
    ranks = sum(other.request == one.request for other in requests)
    slowest = f", the slowest of {ranks} processes" if ranks > 1 else ""
    yield (
        f"request {one.request} waited {human_time(one.seconds)} for the tiers, from "
        f"{_moment(one.began)} (process {one.client}{slowest})"
    )
    if one.operations:
        yield _steps(one)
    yield from _notes(one)


def _steps(one: RequestTimes) -> "Table":
    table = _table("step", "calls", "pages", "found or loaded", "time", "share")
    for operation, times in one.operations.items():
        rows = [(operation, times)]
        rows += [
            (f"  {_NAMES.get(name, name)}", step)
            for name, step in one.steps.get(operation, {}).items()
        ]
        for name, part in rows:
            table.add_row(
                name,
                *(str(part.calls), str(part.pages), str(part.done), human_time(part.seconds)),
                f"{100 * part.seconds / (one.seconds or 1):.0f} %",
            )
    return table


def _notes(one: RequestTimes) -> Iterator[str]:
    if one.calls_before:
        spent = human_time(one.seconds_before)
        yield f"- {one.calls_before} earlier calls ({spent}) were not logged step by step"
    if one.skipped:
        yield (
            f"- {one.skipped} pages were found but not loaded, because recomputing them is faster "
            "(engine.skip_slow_loads)"
        )
    if one.incomplete:
        yield (
            f"- {one.incomplete} lookups were incomplete: time ran out or a tier failed, so pages "
            "may have been missed"
        )
    yield from (f"- {problem}" for problem in one.problems)
    for operation, seconds in one.server.items():
        agent = one.operations.get(operation)
        inside = f", of which {human_time(agent.seconds)} in the agent" if agent else ""
        yield f"- the server waited {human_time(seconds)} for its {operation}{inside}"


def _moment(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        left = column in ("request", "began", "step")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table
