"""Inject faults into a small cluster under traffic; measure what its clients and processes see."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from memkv_testbed.faults.base import BUDGETS, Fault, Outcome, percentile
from memkv_testbed.faults.cluster import ENGINE, PAGE_BYTES, Cluster
from memkv_testbed.faults.growth import Growth
from memkv_testbed.faults.registry import FAULTS
from memkv_testbed.faults.rounds import AUDIT, Rounds
from rich.progress import track

from benchmarks.base import Options
from benchmarks.report import Report
from memkv_sglang.config.schema import MIB, CollectorConfig

ROUNDS = 200
QUICK_ROUNDS = 12
MEDIA = ("minio", "bucket", "client", "nvme", "process")
"""Order of the faults. Those that end agents come last, so that until then the agents grow old."""
KILLS = 4
"""One of this many rounds kills the agent at a random moment instead of injecting a fault."""
LIMITS = CollectorConfig(capacity=128 * MIB, max_age=240, interval=5, use_period=2, lease_ttl=5)
"""Limits of the bucket. 30 rounds store several times the capacity."""


def run(options: Options) -> Report:
    """Inject every fault in turn, then kill the agent at random moments."""
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    kills = rounds // KILLS
    growth, outcomes = Growth(), []
    with Cluster(collector=LIMITS) as cluster:
        work = Rounds(cluster)
        try:
            for fault in track(_plan(rounds - kills), "faults"):
                outcomes.append(work.run(fault))
                growth.sample(node.agent_pid() for node in cluster.nodes)
            outcomes.append(work.kill_agent(kills))
            outcomes.append(work.audit())
        finally:
            work.close()
    report = _report(outcomes, growth, rounds)
    stored = sum(outcome.acknowledged_pages for outcome in outcomes)
    report.figures |= {
        "collections": work.retention.rounds,
        "collected_pages": work.retention.removed_pages,
        "stored_bytes_over_capacity": round(stored * PAGE_BYTES / LIMITS.capacity, 1),
        "most_bytes_over_capacity": round(work.retention.most_bytes / LIMITS.capacity, 3),
        "most_listed_bytes_over_capacity": round(
            work.retention.most_listed_bytes / LIMITS.capacity, 3
        ),
        "most_batches_over_capacity": round(work.retention.most_batches_over, 3),
        "expired_pages_left": work.expired_pages_left,
    }
    return report


def _plan(rounds: int) -> list[Fault]:
    """Return all faults in turn. Those that kill agents come last, so that agents grow old."""
    faults = list(islice(cycle(FAULTS.values()), rounds))
    return sorted(faults, key=lambda fault: MEDIA.index(fault.medium))


def _report(outcomes: Sequence[Outcome], growth: Growth, rounds: int) -> Report:
    report = Report("faults", "ms")
    for outcome in outcomes:
        for violation in outcome.violations:
            report.notes.append(f"{outcome.fault}: {violation}")
    cases: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    during = [outcome for outcome in outcomes if outcome.fault != AUDIT]
    for outcome in during:
        for name, seconds in _times(outcome):
            cases[outcome.fault][name].append(seconds * 1e3)
    report.runs = {case: dict(times) for case, times in cases.items()}
    grown = growth.total()
    lookups = [seconds for outcome in outcomes for seconds in outcome.lookups]
    most = BUDGETS * ENGINE.lookup_budget
    totals = {
        name: sum(getattr(outcome, name) for outcome in outcomes)
        for name in (
            "calls",
            "acknowledged_pages",
            "wrong_pages",
            "acknowledged_pages_lost",
            "destroyed_pages",
            "hung_calls",
            "changed_pages",
        )
    }
    report.figures = {
        "rounds": rounds,
        "faults_injected": rounds,
        "kinds_of_faults": len(cases),
        "pages_compared": sum(outcome.hits for outcome in outcomes),
        "pages_compared_at_the_end": sum(o.hits for o in outcomes if o.fault == AUDIT),
        **totals,
        "violations": sum(len(outcome.violations) for outcome in outcomes),
        "lookup_p99_ms": round(percentile(lookups, 0.99) * 1e3, 1),
        "over_budget_rounds": sum(outcome.lookup_p99 > most for outcome in during),
        "slowest_move_s": round(max(outcome.slowest_move for outcome in outcomes), 2),
        "thread_growth": grown.threads,
        "descriptor_growth": grown.descriptors,
        "memory_growth_mb": round(grown.memory_mb, 1),
        "rounds_of_the_oldest_agent": growth.longest,
        "slowest_first_hit_s": round(max(outcome.first_hit for outcome in outcomes), 2),
    }
    return report


def _times(outcome: Outcome) -> Iterator[tuple[str, float]]:
    yield "lookup, 99th percentile", outcome.lookup_p99
    yield "slowest load or spill", outcome.slowest_move
    yield "first hit afterwards", outcome.first_hit
    if outcome.circuit_opened is not None:
        yield "circuit open", outcome.circuit_opened
