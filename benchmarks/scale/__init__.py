"""Simulate the headline claims, and find the first bottleneck of larger clusters.

Nothing is measured here: every figure follows from `memkv_sglang/planning/calibration` and the
scenarios in this folder. `docs/scale.md` explains them; `published` compares the simulator with
published results.
"""

import time

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.scale.cases import base, node_rate, tell
from benchmarks.scale.fleet import beyond, thousand
from benchmarks.scale.published import add_published
from benchmarks.scale.sessions import compare_sessions
from benchmarks.scale.shocks import add_shocks
from benchmarks.scale.sweeps import add_sweeps


def run(options: Options) -> Report:
    """Run every part; `quick` uses fewer models, contexts and sessions."""
    report = Report("scale", "simulated")
    began = time.monotonic()
    parts = {
        "sessions per GPU": compare_sessions,
        "shocks": add_shocks,
        "sweeps": add_sweeps,
        "125 nodes": thousand,
        "1,250 nodes": beyond,
    }
    _one_node(report)
    add_published(report)
    for name, part in parts.items():
        tell(name)
        part(report, quick=options.quick)
        tell(f"{name}: done after {time.monotonic() - began:.0f} s")
    report.notes.append("simulated, not measured; each number's source is in the calibration files")
    return report


def _one_node(report: Report) -> None:
    """One node of eight H200 and two servers, with a network of 800 Gb/s."""
    cases = {
        "two servers, no internode traffic": base(servers=2, layout="shards"),
        "one cluster of two servers": base(servers=2),
        "two servers at MinIO's published rate": base(
            servers=2, layout="shards", server_limit=33.5e9
        ),
        "three servers at MinIO's published rate": base(
            servers=3, layout="shards", server_limit=33.5e9
        ),
        "two servers of 32 cores": base(servers=2, layout="shards", server_cores=32.0),
    }
    case = "one node loads"
    for name, scenario in cases.items():
        rate, limit = node_rate(scenario)
        report.record(case, name, rate / 1e9)
        report.facts.setdefault("one_node", {})[name] = {"gb_s": rate / 1e9, "limit": limit}
    rate = report.median(case, "two servers, no internode traffic")
    report.figures |= {"scale_node_gb_s": rate, "scale_node_line_share": rate / 100}
    report.panels.append(Panel("one node of eight H200, 800 Gb/s", "GB/s", {"70B": case}))
