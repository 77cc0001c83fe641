"""Run 64 clients at full rate on one agent and check every page."""

import msgspec
from memkv_testbed.faults.base import percentile
from memkv_testbed.faults.cluster import ENGINE, Cluster
from memkv_testbed.faults.load import BACKLOG, CAPACITY, Loaded, put_under_load
from memkv_testbed.faults.tally import Tally

from benchmarks.base import Options
from benchmarks.report import Report

CLIENTS = 64
SECONDS = 120.0
"""Seconds per repetition. Five repetitions take ten minutes."""
QUICK_SECONDS = 20.0
QUANTILES = {"median": 0.5, "99th percentile": 0.99}


def run(options: Options) -> Report:
    """Put one cluster under load several times, each time with new clients."""
    seconds = QUICK_SECONDS if options.quick else SECONDS
    repetitions = 1 if options.quick else options.repetitions
    report = Report("load", "ms")
    engine = msgspec.structs.replace(ENGINE, upload_backlog=BACKLOG)
    with Cluster(engine=engine, capacity=CAPACITY) as cluster:
        parts = [put_under_load(cluster, CLIENTS, seconds) for _ in range(repetitions)]
    report.runs[f"lookup, {CLIENTS} clients"] = {
        name: [part.percentile(share) * 1e3 for part in parts] for name, share in QUANTILES.items()
    }
    report.runs["load or spill"] = {
        name: [percentile(part.tally.moves, share) * 1e3 for part in parts]
        for name, share in QUANTILES.items()
    }
    report.figures = _figures(parts, seconds)
    return report


def _figures(parts: list[Loaded], seconds: float) -> dict[str, float]:
    total = Tally()
    for part in parts:
        total += part.tally
    first, last = parts[0].first, parts[-1].last
    return {
        "clients": CLIENTS,
        "seconds": seconds * len(parts),
        "calls": total.calls,
        "calls_per_second": round(total.calls / (seconds * len(parts))),
        "pages_compared": total.hits,
        "wrong_pages": total.wrong,
        "errors": len(total.errors),
        "hung_calls": total.hung,
        "lookup_p99_ms": round(percentile(total.lookups, 0.99) * 1e3, 1),
        "most_of_capacity": round(max(part.most_bytes for part in parts) / CAPACITY, 4),
        "most_of_backlog": round(max(part.most_queued for part in parts) / BACKLOG, 4),
        "thread_growth": last.threads - first.threads,
        "descriptor_growth": last.descriptors - first.descriptors,
        "memory_growth_mb": round(last.memory_mb - first.memory_mb, 1),
    }
