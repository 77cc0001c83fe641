"""Replay traces on four nodes, and count hits and PUTs with each rule of `engine.upload`."""

from pathlib import Path

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.trace.cluster import PLACEMENTS
from benchmarks.trace.requests import Workload, mooncake
from benchmarks.trace.uploads import RULES, replay
from memkv_sglang.planning.traces import read_trace

AGENTIC = Path(__file__).parent / "traces" / "agentic-dev.jsonl.gz"
BLOCKS = 8
"""Blocks of the agentic trace per page. A page then has 512 tokens, as in Mooncake's trace."""
DISK_SHARE = 0.1
"""Size of each node's disk, as a share of the trace's different pages."""
QUICK_REQUESTS = 300


def agentic() -> Workload:
    """Read the trace of coding agents. Leaves out each prompt's last, incomplete page."""
    trace = read_trace(AGENTIC)
    requests = [one.runs(BLOCKS)[: one.pages // BLOCKS] for one in trace.requests]
    return Workload("agentic", requests, [one.seconds for one in trace.requests])


def run(options: Options) -> Report:
    """Replay both traces once. The result depends on no clock, so repetitions are not needed."""
    report = Report("uploads", "hits: share of the ideal; PUTs: per page that the trace has")
    for trace in (mooncake(), agentic()):
        workload = trace.first(QUICK_REQUESTS) if options.quick else trace
        for placement in PLACEMENTS:
            _replay(report, workload, placement)
    return report


def _replay(report: Report, trace: Workload, placement: str) -> None:
    placed = PLACEMENTS[placement](trace.requests)
    pages = max(int(trace.pages * DISK_SHARE), 1)
    outcomes = {rule: replay(trace.requests, placed, pages, rule) for rule in RULES}
    case = f"{trace.name}, {placement}"
    ideal, different = trace.ideal_hits, trace.pages
    report.runs[f"hits: {case}"] = {rule: [o.hits / ideal] for rule, o in outcomes.items()}
    report.runs[f"PUTs: {case}"] = {rule: [o.puts / different] for rule, o in outcomes.items()}
    for what in ("hits", "PUTs"):
        report.panels.append(Panel(f"{what}: {case}", "share", {placement: f"{what}: {case}"}))
    default, suffix = outcomes["always"], f"{trace.name}_{placement}".replace(" ", "_")
    for rule, outcome in outcomes.items():
        if rule != "always":
            key = f"{rule}_{suffix.replace('-', '_')}"
            report.figures[f"uploads_hits_over_always_{key}"] = outcome.hits / default.hits
            report.figures[f"uploads_puts_over_always_{key}"] = outcome.puts / default.puts
