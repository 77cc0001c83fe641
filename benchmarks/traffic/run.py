"""Compare storage below SGLang, and policies of its router, with sessions of coding agents."""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from sglang_cpu_platform.router import Router

from benchmarks.base import Options
from benchmarks.report import Panel, Report
from benchmarks.serving import Servers, tell
from benchmarks.traffic.answers import Reference
from benchmarks.traffic.conversations import draw
from benchmarks.traffic.systems import (
    POOLS,
    TIERS,
    Memkv,
    Peer,
    Stint,
    System,
    replay,
    route,
)

SESSIONS, QUICK_SESSIONS = 10, 6
"""Number of sessions, whose contexts need about twice the space of both host pools."""
TURNS, QUICK_TURNS = 2, 1
"""Timed turns per session. One turn before them is not timed."""

FIRST, MEDIAN, TAIL = "first token", "median", "95th percentile"

OURS, SEAWEEDFS, NONE = "memkv", "seaweedfs", "host pool only"

ROUND_ROBIN, DEFAULTS = "round robin", "cache-aware"
POLICIES: dict[str, tuple[str, Sequence[str]]] = {
    ROUND_ROBIN: ("round_robin", ()),
    DEFAULTS: ("cache_aware", ()),
    "cache-aware, threshold 0.9": ("cache_aware", ("--cache-threshold", "0.9")),
    "cache-aware, balanced early": (
        "cache_aware",
        ("--balance-abs-threshold", "1", "--balance-rel-threshold", "1.1"),
    ),
}
COMMON = (ROUND_ROBIN, DEFAULTS)
"""Policies of every system. Only this project's servers run with the others."""


class _Contestant(NamedTuple):
    system: System
    policy: str
    router: Router

    @property
    def name(self) -> str:
        return f"{self.system.name}, {self.policy}"


def run(options: Options) -> Report:
    """Measure six servers, of which two work at a time; needs about 10 GiB of memory.

    Each run draws other sessions. `--quick` runs one round of fewer and shorter ones.
    """
    seed = int(time.time())
    report = Report("traffic", "seconds to first token")
    hits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    wrong: Counter[str] = Counter()
    sessions = QUICK_SESSIONS if options.quick else SESSIONS
    turns = 1 + (QUICK_TURNS if options.quick else TURNS)
    with Servers(options.directory) as servers:
        contestants, reference = _start(servers)
        for one in {one.system: one for one in contestants}.values():
            replay(one.system, one.router, draw(2, 3, "warm-up", "warm-up"))
        for number in range(1 if options.quick else options.repetitions):
            stints: dict[str, Stint] = {}
            for one in _in_turn(contestants, seed + number):
                name = f"{seed} {number}"
                conversations = draw(sessions, turns, name, f"{name} {one.policy}")
                stints[one.name] = stint = replay(one.system, one.router, conversations)
                _record(report, one.name, stint)
                hits[one.name].update(stint.hits)
            tell("comparing the answers with servers without storage")
            for name, stint in stints.items():
                wrong[name] += reference.wrong(stint.conversations)
    report.facts |= {"seed": seed, "hits": hits, "wrong": wrong}
    claim(report)
    return report


def _start(servers: Servers) -> tuple[list[_Contestant], Reference]:
    memkv = Memkv(servers)
    alone = [servers.host_pool(POOLS, name) for name in ("n1", "n2")]
    systems: list[System] = [
        memkv,
        Peer(SEAWEEDFS, [servers.seaweedfs(64, POOLS, name) for name in ("s1", "s2")]),
        Peer(NONE, alone),
    ]
    servers.wait()
    contestants = [
        _Contestant(system, name, route(servers, system, policy, extra))
        for name, (policy, extra) in POLICIES.items()
        for system in (systems if name in COMMON else [memkv])
    ]
    return contestants, Reference(alone)


def _in_turn(contestants: Sequence[_Contestant], number: int) -> list[_Contestant]:
    """Return the contestants, in the opposite order in every second round."""
    return list(contestants if number % 2 == 0 else reversed(contestants))


def _record(report: Report, name: str, stint: Stint) -> None:
    times = stint.first_tokens()
    for value in times:
        report.record(FIRST, name, value)
    report.record(MEDIAN, name, statistics.median(times))
    report.record(TAIL, name, _tail(times))
    shares = ", ".join(f"{tier} {100 * _share(stint.hits, tier):.0f} %" for tier in TIERS)
    tell(f"{name}: median {statistics.median(times):.2f} s, 95th {_tail(times):.2f} s; {shares}")


def _share(hits: Counter[str], tier: str) -> float:
    return hits[tier] / max(hits.total(), 1)


def _tail(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=20, method="inclusive")[-1]


def claim(report: Report) -> None:
    """Add the figures and the hits."""
    for name, counts in report.facts["hits"].items():
        for tier in TIERS:
            report.record(f"{name}: prompt tokens", tier, 100 * _share(Counter(counts), tier))
    report.figures["traffic_wrong_outputs"] = sum(report.facts["wrong"].values())
    for policy in COMMON:
        ours = f"{OURS}, {policy}"
        for peer, base in (("seaweedfs", SEAWEEDFS), ("no_storage", NONE)):
            _compare(report, f"over_{peer}_{_key(policy)}", ours, f"{base}, {policy}")
    for policy in POLICIES:
        if policy != DEFAULTS:
            ours, base = f"{OURS}, {policy}", f"{OURS}, {DEFAULTS}"
            _compare(report, f"{_key(policy)}_over_cache_aware", ours, base)
    tokens = {name: f"{name}: prompt tokens" for name in report.facts["hits"]}
    report.panels += [
        Panel("sessions of coding agents", report.unit, {MEDIAN: MEDIAN, TAIL: TAIL}, log=True),
        Panel("hits", "% of the prompt tokens", tokens),
    ]
    report.notes.append(
        "The first turn of each session is not timed. Panels show the 95th percentile of each "
        "round; figures use that of the requests of all rounds."
    )


def _key(policy: str) -> str:
    return policy.replace(",", "").replace(" ", "_").replace("-", "_").replace(".", "_")


def _compare(report: Report, key: str, name: str, base: str) -> None:
    """Add the ratios of the medians and of the 95th percentiles."""
    runs = report.runs[FIRST]
    report.figures |= {
        f"traffic_p50_{key}": report.ratio(FIRST, name, base),
        f"traffic_p95_{key}": _tail(runs[name]) / _tail(runs[base]),
    }
