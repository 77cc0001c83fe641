"""Vary one thing at a time around the headline's fleet, on 8 nodes."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.report import Panel, Report
from benchmarks.scale.cases import agents, base
from memkv_sglang.planning.cluster import Result, simulate
from memkv_sglang.planning.sizing import DAY

NODES = 8
TB = 1e12

SWEEPS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "servers per node": {
        str(share): {"servers": int(share * NODES), "router": "round_robin"}
        for share in (0.25, 0.5, 1, 2)
    },
    "router": {
        name: {"router": name}
        for name in ("sticky", "cache_aware", "tier_aware", "least_loaded", "round_robin")
    },
    "cache-aware, balance thresholds": {
        f"{absolute}, {relative:g}": {
            "router": "cache_aware",
            "balance_absolute": absolute,
            "balance_relative": relative,
        }
        for absolute, relative in ((64, 1.5), (16, 1.5), (4, 1.5), (1, 1.1))
    },
    "share of turns that move": {
        f"{share:g}": {"moves": share} for share in (0, 0.05, 0.2, 0.5, 1)
    },
    # The trace's blocks have 64 tokens, so only the size of objects varies. The part of a page that
    # is recomputed, half a page on average, does not.
    "page, tokens": {
        str(tokens): {"objects_per_page": 8 * 64 // tokens, "router": "round_robin"}
        for tokens in (16, 64, 256)
    },
    "layout": {
        "cluster": {"router": "round_robin", "servers": NODES},
        "shards": {"router": "round_robin", "layout": "shards", "servers": NODES},
    },
    "oversubscription": {
        f"{factor:g}": {"spine_oversubscription": float(factor), "router": "round_robin"}
        for factor in (1, 4, 16)
    },
    "think time": {f"x {factor:g}": {"think_scale": factor} for factor in (0.2, 0.5, 1, 2)},
    "uploads": {"everything": {}, "nothing": {"uploads": False}},
    "NVMe per node": {
        f"{size:g} TB": {"nvme_bytes": size * TB, "nvme_drive_bytes_per_day": size * TB}
        for size in (0, 2, 7.68, 30.7)
    },
    "promotion to a disk of 2 TB": {
        rule: {"nvme_bytes": 2 * TB, "nvme_drive_bytes_per_day": 2 * TB, "promote": rule}
        for rule in ("always", "second_use", "never")
    },
}
_QUICK = ("router", "servers per node", "NVMe per node", "uploads")

_MEASURES: Mapping[str, tuple[Callable[[Result], float], str]] = {
    "first token, median": (lambda r: r.first_token_p50, "s"),
    "first token, 95 %": (lambda r: r.first_token_p95, "s"),
    "from MinIO, GB/s per node": (lambda r: r.loaded_bytes_per_s["minio"] / NODES / 1e9, ""),
    "uploads, PB a day by 125 nodes": (
        lambda r: r.uploaded_bytes_per_s / NODES * 125 * DAY / 1e15,
        "",
    ),
    "drive writes a day": (lambda r: r.nvme_writes_per_day, ""),
    "busiest resource, % used": (lambda r: 100 * max(r.use.values()), ""),
    "computed pages, %": (lambda r: 100 * r.hits["computed"], ""),
}


def add_sweeps(report: Report, *, quick: bool) -> None:
    """Simulate every sweep."""
    for sweep, cases in SWEEPS.items():
        if quick and sweep not in _QUICK:
            continue
        for name, changes in cases.items():
            result = _run(changes, quick=quick)
            for measure, (value, _) in _MEASURES.items():
                report.record(f"{sweep}: {measure}", name, float(value(result)))
            report.facts.setdefault("sweeps", {})[f"{sweep}: {name}"] = {
                "bottleneck": result.bottleneck,
                "use": result.use,
                "hits": result.hits,
            }
        report.panels.append(
            Panel(
                f"{sweep}, {NODES} nodes",
                "see the case",
                {measure: f"{sweep}: {measure}" for measure in _MEASURES},
            )
        )


def _run(changes: Mapping[str, Any], *, quick: bool) -> Result:
    scenario = base(
        nodes=NODES,
        workload="agentic",
        seconds=60.0 if quick else 240.0,
        warm_up=20.0,
        **{"run_pages": 32, **changes},
    )
    return simulate(scenario, agents())
