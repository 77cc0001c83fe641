"""Compare predictions of the simulator with measurements of this machine.

Links of four agents are measured here. `ttft` and `sessions` are benchmarks of their own;
`python -m benchmarks.predictions.compare` compares their results with the predictions.
"""

import statistics
from collections.abc import Sequence

from benchmarks.base import Options
from benchmarks.predictions.links import Case, Cluster, cases, predict
from benchmarks.report import Panel, Report
from benchmarks.serving import tell
from memkv_sglang.planning.calibration import measured, published

FROZEN = "0bf2080"
"""Commit of the calibration files that the predictions use."""

TOLERANCE = 0.15
PREDICTED, MEASURED = "predicted", "measured"


def run(options: Options) -> Report:
    """Predict all cases, then measure them.

    Raises `MissingToolError` without root, `ip` or `tc`.
    """
    report = Report("predictions", "seconds per call")
    expected = {
        case.name: _quantities(case, predict(case, published(), measured()))
        for case in cases(quick=options.quick)
    }
    for links in dict.fromkeys(case.links for case in cases(quick=options.quick)):
        with Cluster.open(options.directory, links) as cluster:
            chosen = [case for case in cases(quick=options.quick) if case.links == links]
            for _ in range(1 if options.quick else options.repetitions):
                for case in chosen:
                    found = _quantities(case, cluster.measure(case))
                    for name, value in found.items():
                        report.record(name, MEASURED, value)
                        tell(f"{name}: {value:.3f} s, predicted {expected[case.name][name]:.3f} s")
    for values in expected.values():
        for name, value in values.items():
            report.record(name, PREDICTED, value)
    _claim(report)
    return report


def _quantities(case: Case, seconds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return what is compared: medians, by width of the link, and a tail where calls wait."""
    by_link: dict[int, list[float]] = {}
    for session, values in zip(case.sessions, seconds, strict=True):
        by_link.setdefault(case.links[session.agent], []).extend(values)
    name = case.name
    found = {
        name if len(by_link) == 1 else f"{name}: {rate} Mb/s": statistics.median(values)
        for rate, values in by_link.items()
    }
    if any(think for session in case.sessions for think in session.thinks):
        values = [value for each in by_link.values() for value in each]
        tail = statistics.quantiles(values, n=20, method="inclusive")[-1]
        found[f"{name}: 95th percentile"] = tail
    return found


def _claim(report: Report) -> None:
    errors = {}
    within = 0
    for case, runs in report.runs.items():
        expected = report.median(case, PREDICTED)
        spread = (min(runs[MEASURED]), max(runs[MEASURED]))
        errors[case] = expected / report.median(case, MEASURED) - 1
        within += abs(errors[case]) <= TOLERANCE or spread[0] <= expected <= spread[1]
    report.figures |= {
        "predictions_links": len(errors),
        "predictions_links_within_15_percent_or_spread": within,
        "predictions_links_worst_error": max(errors.values(), key=abs),
    }
    report.facts |= {"frozen": FROZEN, "errors": errors}
    report.panels.append(
        Panel("four agents over shaped links", report.unit, {case: case for case in report.runs})
    )
