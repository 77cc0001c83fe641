"""`python -m benchmarks NAME`: run one benchmark, or `all`."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks import (
    agent,
    balance,
    encryption,
    faults,
    fuzz,
    gc,
    gpu,
    interference,
    kills,
    load,
    lookup,
    minio,
    nvme,
    prefetch,
    requests,
    s3,
    scale,
    sessions,
    trace,
    ttft,
    uploads,
)
from benchmarks.all import run_all
from benchmarks.base import MissingToolError, Options
from benchmarks.node import run as node
from benchmarks.picture import draw
from benchmarks.predictions import run as predictions
from benchmarks.report import Report
from benchmarks.shards import run as shards
from benchmarks.table import show
from benchmarks.traffic import run as traffic
from benchmarks.wire import run as wire

BENCHMARKS: dict[str, Callable[[Options], Report]] = {
    "nvme": nvme.run,
    "minio": minio.run,
    "lookup": lookup.run,
    "interference": interference.run,
    "encryption": encryption.run,
    "agent": agent.run,
    "faults": faults.run,
    "fuzz": fuzz.run,
    "load": load.run,
    "gc": gc.run,
    "trace": trace.run,
    "uploads": uploads.run,
    "ttft": ttft.run,
    "sessions": sessions.run,
    "node": node.run,
}

BY_NAME_ONLY = {
    "balance": balance.run,
    "gpu": gpu.run,
    "kills": kills.run,
    "predictions": predictions.run,
    "prefetch": prefetch.run,
    "requests": requests.run,
    "s3": s3.run,
    "scale": scale.run,
    "shards": shards.run,
    "traffic": traffic.run,
    "wire": wire.run,
}
"""Benchmarks that `all` leaves out, because they take long or need what most machines lack."""


@click.command()
@click.argument("name", type=click.Choice([*BENCHMARKS, *BY_NAME_ONLY, "all"]))
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path),
    help="Write every repetition to this file, and a picture (PNG, SVG) next to it. `all` writes "
    "one file per benchmark, with the benchmark's name as suffix.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("/var/tmp"),  # The current directory is on the disk, unlike /tmp on many machines.
    show_default=True,
    help="Directory on the disk to measure.",
)
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--quick", is_flag=True, help="Finish in less than a minute, with noisier results.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Number of faults to inject, agents to kill or inputs to damage.",
)
def main(
    name: str, file: Path | None, directory: Path, repetitions: int, quick: bool, rounds: int | None
) -> None:
    """Run a benchmark with interleaved contestants; print tables and figures."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # also end servers and remove files
        signal.signal(number, signal.default_int_handler)
    options = Options(directory, repetitions, quick, rounds)
    if name == "all":
        sys.exit(run_all(list(BENCHMARKS), options, file))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = {**BENCHMARKS, **BY_NAME_ONLY}[name](options)
    except MissingToolError as error:
        click.echo(f"benchmarks: {error}", err=True)
        sys.exit(2)
    show(report)
    if file is not None:
        report.write(file)
        draw(report, file)


if __name__ == "__main__":
    main()
