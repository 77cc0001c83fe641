"""The fleets of the headline and beyond: 125 and 1,250 nodes with sessions of coding agents."""

import resource
import time
from typing import Any

from benchmarks.report import Panel, Report
from benchmarks.scale.cases import agents, base, node_rate, tell
from memkv_sglang.planning.cluster import Result, simulate
from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.sizing import servers_needed

HEADLINE_BYTES = 12e12
HEADLINE_SESSIONS = 16_000
SPEED_TARGETS = {"scale_1000_speed": 10, "scale_10000_speed": 1}


def thousand(report: Report, *, quick: bool) -> None:
    """Simulate 125 nodes: what 16,000 sessions need, by router, and what 12 TB/s would take."""
    seconds = 60.0 if quick else 300.0
    for router in ("sticky", "round_robin"):
        scenario = base(nodes=125, workload="agentic", router=router, seconds=seconds, warm_up=30.0)
        result, speed = _timed(scenario)
        _record(report, f"125 nodes, {router}", result)
        if router == "sticky":
            report.figures["scale_1000_speed"] = speed
        else:
            report.figures["scale_1000_agentic_tb_s"] = result.loaded_bytes_per_s["minio"] / 1e12
    one = base(servers=2, layout="shards")
    rate, _ = node_rate(one)
    report.figures |= {
        "scale_1000_requests": HEADLINE_SESSIONS,
        "scale_1000_tb_s": 125 * rate / 1e12,
    }
    fleet = base(nodes=125)
    kinds: dict[str, dict[str, Any]] = {
        "measured CPU, no internode traffic": {"layout": "shards"},
        "measured CPU, one cluster": {},
        "published rate per server": {"layout": "shards", "server_limit": 33.5e9},
    }
    for name, changes in kinds.items():
        servers, limit = servers_needed(fleet.replace(**changes), HEADLINE_BYTES * 0.7, 0.0)
        report.record("servers for 12 TB/s", name, servers)
        report.facts.setdefault("servers_for_12_tb_s", {})[name] = [servers, limit]
    report.panels.append(
        Panel("servers that 12 TB/s needs", "servers", {"": "servers for 12 TB/s"})
    )
    _panels(report, "125 nodes")


def beyond(report: Report, *, quick: bool) -> None:
    """Simulate 1,250 nodes: what is the first bottleneck."""
    scenario = base(
        nodes=1250,
        workload="agentic",
        router="sticky",
        moves=0.1,
        seconds=20.0 if quick else 120.0,
        warm_up=10.0,
    )
    result, speed = _timed(scenario)
    _record(report, "1,250 nodes, sticky, 10 % move", result)
    report.figures |= {
        "scale_10000_speed": speed,
        "scale_10000_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "scale_10000_bound": max(result.use.values()),
    }
    report.notes.append(f"1,250 nodes: the busiest resource is {result.bottleneck}")
    _panels(report, "1,250 nodes")


def _timed(scenario: Scenario) -> tuple[Result, float]:
    """Return the result, and simulated seconds per CPU second without building the cluster."""
    marks: list[float] = []
    built = time.process_time()
    result = simulate(scenario, agents(), tell=lambda _: marks.append(time.process_time()))
    # The first report comes after the warm-up and a twentieth of the run.
    speed = 0.95 * scenario.seconds / (marks[-1] - marks[0])
    tell(f"{scenario.nodes} nodes: {speed:.1f} times real time, {marks[-1] - built:.0f} s of CPU")
    return result, speed


def _record(report: Report, case: str, result: Result) -> None:
    for tier, share in result.hits.items():
        report.record(f"{case}: pages from", tier, 100 * share)
    busiest = sorted(result.use.items(), key=lambda item: -item[1])[:6]
    for name, share in busiest:
        report.record(f"{case}: used", name, 100 * share)
    summary: dict[str, Any] = result.summary()
    report.facts.setdefault("fleets", {})[case] = summary


def _panels(report: Report, name: str) -> None:
    cases = [case for case in report.runs if case.startswith(f"{name}, ")]
    for what, unit in (("pages from", "% of pages"), ("used", "% of the capacity")):
        shown = {
            case.split(", ", 1)[1].split(":")[0]: case
            for case in cases
            if case.endswith(f": {what}")
        }
        report.panels.append(Panel(f"{name}: {what}", unit, shown))
