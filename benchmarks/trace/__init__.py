"""Replay a published request trace: measure hits, bytes written and load times.

Hits and bytes come from the NVMe tier's own eviction order and the engine's own admission rule,
which work on page numbers here (`product`, `cluster`). A test shows that the real tier makes the
same decisions. Load times come from real engines with real directories and a real MinIO (`loads`).
"""

import statistics
from collections.abc import Callable

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.trace.cluster import (
    PLACEMENTS,
    SECOND_USE,
    WRITE_EVERYTHING,
    LruDisk,
    Outcome,
    Rules,
    replay,
)
from benchmarks.trace.loads import Admission, Served, serve
from benchmarks.trace.peers import ONLINE, Belady, hits_of_peer
from benchmarks.trace.product import ProductCache, ProductDisks
from benchmarks.trace.requests import Workload, mooncake

DISKS = 4
"""Number of disks that share a capacity, to compare with a single disk."""
SHARES = (2, 5, 10, 20)
"""Capacities, in percent of the trace's different pages."""
QUICK_REQUESTS = 1500
"""Number of requests that a quick run replays for the bytes written."""
LOADED_REQUESTS, QUICK_LOADED_REQUESTS = 1000, 60
"""Number of requests that are replayed for load times."""
RULES = {
    "memkv, write everything": WRITE_EVERYTHING,
    "memkv, the default": Rules(spills=True, promote="second_use"),
    "memkv, second_use": SECOND_USE,
}


def run(options: Options) -> Report:
    """Replay the trace. Load times are measured on its first part."""
    trace = mooncake()
    report = Report("trace", "share of ideal hits; pages written a useful page; load in ms")
    _compare_orders(report, trace, both=not options.quick)
    _compare_admission(report, trace.first(QUICK_REQUESTS) if options.quick else trace)
    if options.quick:
        note = f"bytes written are those of the first {QUICK_REQUESTS} requests, which repeat less"
        report.notes.append(note)
    loaded = trace.first(QUICK_LOADED_REQUESTS if options.quick else LOADED_REQUESTS)
    _measure_loads(report, loaded, options)
    return report


def _compare_orders(report: Report, trace: Workload, *, both: bool) -> None:
    ratios = []
    for share in SHARES:
        pages = trace.pages * share // 100
        peers = {
            name: hits_of_peer(kind, pages, trace.requests, both=both)
            for name, kind in ONLINE.items()
        }
        ours = sum(map(ProductCache(pages).request, trace.requests))
        belady = sum(map(Belady(pages, trace.requests).request, trace.requests))
        hits = {"memkv": ours, **peers, "Belady": belady}
        report.runs[f"hits at {share} %"] = {
            name: [value / trace.ideal_hits] for name, value in hits.items()
        }
        ratios.append(ours / max(peers.values()))
        report.figures[f"trace_hits_over_best_online_{share}"] = ratios[-1]
        report.figures[f"trace_hits_over_belady_{share}"] = ours / belady
        striped = sum(map(ProductDisks(pages, DISKS).request, trace.requests))
        report.figures[f"trace_hits_{DISKS}_disks_over_one_{share}"] = striped / ours
    report.figures["trace_hits_over_best_online"] = min(ratios)
    cases = {f"{share} %": f"hits at {share} %" for share in SHARES}
    title = "hits by capacity, in per cent of the pages"
    report.panels.append(Panel(title, "of the ideal hits", cases, lines=True))


def _compare_admission(report: Report, trace: Workload) -> None:
    pages = trace.pages // 10
    for name, place in PLACEMENTS.items():
        placed = place(trace.requests)
        lru = replay(trace.requests, placed, pages, WRITE_EVERYTHING, LruDisk)
        outcomes = {
            rule: replay(trace.requests, placed, pages, rules, ProductCache)
            for rule, rules in RULES.items()
        }
        shown = {"LRU, write everything": lru, **outcomes}
        for what, value in _VALUES.items():
            report.runs[f"{name}: {what}"] = {rule: [value(o)] for rule, o in shown.items()}
        ruled, everything = outcomes["memkv, second_use"], outcomes["memkv, write everything"]
        suffix = "" if name == "round robin" else "_prefix_aware"
        report.figures |= {
            f"trace_nvme_bytes_over_write_everything{suffix}": ruled.written / everything.written,
            f"trace_admission_nvme_hits_over_lru{suffix}": ruled.nvme_hits / lru.nvme_hits,
            f"trace_admission_hits_over_all{suffix}": ruled.hits / lru.hits,
        }
    for what in _VALUES:
        cases = {name: f"{name}: {what}" for name in PLACEMENTS}
        report.panels.append(Panel(f"{what}, four nodes", "share", cases))


_VALUES: dict[str, Callable[[Outcome], float]] = {
    "pages written a page hit": lambda o: o.written / o.hits,
    "hits on this node's disk, of all": lambda o: o.nvme_hits / o.hits,
}


def _measure_loads(report: Report, trace: Workload, options: Options) -> None:
    """Measure load times on nodes that have space for every page."""
    shares = []
    cases = {}
    rules: tuple[Admission, ...] = ("always", "second_use")
    for name, place in PLACEMENTS.items():
        for rule in rules:
            served = serve(trace, place(trace.requests), trace.pages, rule, options.directory)
            shares.append(served.hits / served.ideal)
            case = f"{name}, {rule}"
            _report_loads(report, case, served)
            cases[case.replace(", ", ",\n")] = f"load: {case}"
    report.figures["trace_hits_over_ideal"] = min(shares)
    report.panels.append(Panel("load calls", "ms", cases, log=True))


def _report_loads(report: Report, case: str, served: Served) -> None:
    cuts = statistics.quantiles(served.milliseconds, n=100)
    report.runs[f"load: {case}"] = {"median": [cuts[49]], "99 %": [cuts[98]]}
    report.runs[f"hits: {case}"] = {"memkv, of the ideal hits": [served.hits / served.ideal]}
    key = "trace_load_ms_" + case.replace(", ", "_").replace(" ", "_").replace("-", "_")
    report.figures |= {f"{key}_p50": cuts[49], f"{key}_p99": cuts[98]}
