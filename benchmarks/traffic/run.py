"""Compare storage below SGLang, and policies of its router, with sessions of coding agents."""

import statistics
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
    Answered,
    Memkv,
    Peer,
    Stint,
    System,
    replay,
    route,
)

SESSIONS, QUICK_SESSIONS = 10, 6
TURNS, QUICK_TURNS = 4, 2
"""Turns of a session that are timed. One more opens it."""

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
    """Measure seven servers, which take turns; needs about 12 GiB of memory.

    `--quick` runs one round of fewer and shorter sessions.
    """
    report = Report("traffic", "seconds to first token")
    hits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    wrong: Counter[str] = Counter()
    sessions = QUICK_SESSIONS if options.quick else SESSIONS
    turns = 1 + (QUICK_TURNS if options.quick else TURNS)
    with Servers(options.directory) as servers:
        contestants, reference = _start(servers)
        for number in range(1 if options.quick else options.repetitions):
            answered: dict[str, list[Answered]] = {}
            for one in _in_turn(contestants, number):
                conversations = draw(sessions, turns, f"{number}", f"{number} {one.policy}")
                stint = replay(one.system, one.router, conversations)
                _record(report, one.name, stint)
                hits[one.name].update(stint.hits)
                answered[one.name] = [*stint.opened, *stint.continued]
            tell("comparing the answers with a server without storage")
            wrong.update(reference.wrong(answered))
    _claim(report, hits, wrong)
    return report


def _start(servers: Servers) -> tuple[list[_Contestant], Reference]:
    memkv = Memkv(servers)
    systems: list[System] = [
        memkv,
        Peer(SEAWEEDFS, [servers.seaweedfs(64, POOLS, name) for name in ("s1", "s2")]),
        Peer(NONE, [servers.host_pool(POOLS, name) for name in ("n1", "n2")]),
    ]
    reference = Reference(servers.peer("reference", POOLS[:2]))
    servers.wait()
    contestants = [
        _Contestant(system, name, route(servers, system, policy, extra))
        for name, (policy, extra) in POLICIES.items()
        for system in (systems if name in COMMON else [memkv])
    ]
    return contestants, reference


def _in_turn(contestants: Sequence[_Contestant], number: int) -> list[_Contestant]:
    """Return the contestants, in the opposite order in every second round."""
    return list(contestants if number % 2 == 0 else reversed(contestants))


def _record(report: Report, name: str, stint: Stint) -> None:
    times = [answer.ttft_s for _, answer in stint.continued]
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


def _claim(report: Report, hits: dict[str, Counter[str]], wrong: Counter[str]) -> None:
    for name, counts in hits.items():
        for tier in TIERS:
            report.record("prompt tokens from", f"{name}: {tier}", 100 * _share(counts, tier))
    report.facts["hits"] = {name: dict(counts) for name, counts in hits.items()}
    report.facts["wrong"] = dict(wrong)
    report.figures["traffic_wrong_outputs"] = wrong.total()
    for policy in COMMON:
        key = policy.replace(" ", "_").replace("-", "_")
        ours = f"{OURS}, {policy}"
        for peer, base in (("seaweedfs", SEAWEEDFS), ("no_storage", NONE)):
            other = f"{base}, {policy}"
            report.figures |= {
                f"traffic_p50_over_{peer}_{key}": report.ratio(FIRST, ours, other),
                f"traffic_p95_over_{peer}_{key}": _tail(report.runs[FIRST][ours])
                / _tail(report.runs[FIRST][other]),
            }
    base = f"{OURS}, {DEFAULTS}"
    for policy in POLICIES:
        if policy != DEFAULTS:
            key = policy.replace(" ", "_").replace("-", "_").replace(",", "").replace(".", "_")
            name = f"{OURS}, {policy}"
            report.figures |= {
                f"traffic_{key}_over_cache_aware_p50": report.ratio(FIRST, name, base),
                f"traffic_{key}_over_cache_aware_p95": _tail(report.runs[FIRST][name])
                / _tail(report.runs[FIRST][base]),
            }
    report.panels += [
        Panel("sessions of coding agents", report.unit, {MEDIAN: MEDIAN, TAIL: TAIL}, log=True),
        Panel("hits", "% of the prompt tokens", {"": "prompt tokens from"}),
    ]
    report.notes.append(
        "The first turn of each session is not timed. The 95th percentile of a round is that of "
        "its requests; figures use the requests of all rounds."
    )
