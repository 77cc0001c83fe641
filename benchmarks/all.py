"""Run every benchmark in its own process, then print the table of targets."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.base import Options
from benchmarks.targets import show_targets


def run_all(names: Sequence[str], options: Options, file: Path | None) -> int:
    """Run the benchmarks one after another; returns 1 if one of them failed.

    Each has its own process, so memory, threads and affinity do not carry over, and a crash only
    loses its own figures.
    """
    with tempfile.TemporaryDirectory() as scratch:
        base = file or Path(scratch) / "all.json"
        figures: dict[str, float] = {}
        failed = []
        for name in names:
            written = base.with_stem(f"{base.stem}-{name}")
            if _run(name, options, written) == 0:
                figures |= json.loads(written.read_text())["figures"]
            else:
                failed.append(name)
        show_targets(figures)
    for name in failed:
        click.echo(f"benchmarks: {name} did not finish; see above", err=True)
    return 1 if failed else 0


def _run(name: str, options: Options, file: Path) -> int:
    command = [sys.executable, "-m", "benchmarks", name, "--json", str(file)]
    command += ["--directory", str(options.directory), "--repetitions", str(options.repetitions)]
    if options.quick:
        command.append("--quick")
    if options.rounds is not None:
        command += ["--rounds", str(options.rounds)]
    click.echo(f"== {name}")
    began = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    click.echo(f"== {name} took {time.monotonic() - began:.0f} s")
    return code
