"""Compare results of `ttft` and `sessions` with predictions.

`python -m benchmarks.predictions.compare FILE...` prints the predictions without files, and each
file's results beside them.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks import sessions, ttft
from benchmarks.predictions.serving import predict_sessions, predict_ttft, read_costs


def predictions(*, quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Return predicted seconds by benchmark, case and contestant."""
    costs = read_costs()
    context = sessions.QUICK_CONTEXT if quick else sessions.CONTEXT
    return {
        "ttft": predict_ttft(costs, quick=quick),
        "sessions": {f"{context} tokens": predict_sessions(costs, quick=quick)},
    }


def _show(case: str, name: str, expected: float, values: list[float] | None) -> None:
    line = f"{case}, {name}: predicted {expected:.3f}"
    if values:
        found = median(values)
        line += f", measured {found:.3f} ({min(values):.3f} to {max(values):.3f})"
        line += f", {100 * (expected / found - 1):+.0f} %"
    click.echo(line)


def _runs(result: dict[str, Any], case: str) -> dict[str, list[float]]:
    """Return the measurements of a case, and the ratio of the benchmark `sessions`."""
    runs: dict[str, list[float]] = dict(result["runs"].get(case, {}))
    if result["benchmark"] == "sessions" and runs:
        ours = median(runs[sessions.OURS])
        runs["ratio"] = [value / ours for value in runs[sessions.NONE]]
    elif runs:
        base = median(runs["recompute"])
        runs |= {f"{name} / recompute": [v / base for v in runs[name]] for name in _LOADED}
    return runs


_LOADED = (ttft.FAR, "NVMe", "top tier")


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--quick", is_flag=True, help="Print the predictions for quick runs.")
def main(files: tuple[Path, ...], quick: bool) -> None:
    """Print predictions and results."""
    results = [json.loads(file.read_text()) for file in files]
    for benchmark, by_case in predictions(quick=quick).items():
        for case, expected in by_case.items():
            found = [r for r in results if r["benchmark"] == benchmark and case in r["runs"]]
            for name, value in expected.items():
                for result in found or [None]:
                    runs = _runs(result, case) if result else {}
                    _show(f"{benchmark} {case}", name, value, runs.get(name))


if __name__ == "__main__":
    main()
