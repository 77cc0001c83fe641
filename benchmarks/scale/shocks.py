"""Simulate what all nodes do at once: read one prompt, and restart."""

import statistics

from benchmarks.report import Panel, Report
from benchmarks.scale.cases import agents, base
from memkv_sglang.planning.cluster import Served, simulate
from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.storage import hot_servers

HOT_TOKENS = 20_000
"""Tokens of a system prompt with its tools."""
ONE_LOOP = 8
"""Pages in flight per node when one loop served all calls. Each kept one server busy."""
AT = 60.0
WINDOW = 10.0
NODES, QUICK_NODES = 125, 16


def add_shocks(report: Report, *, quick: bool) -> None:
    """Add the effect on the time to first token."""
    nodes = QUICK_NODES if quick else NODES
    _hot_prompt(report, nodes)
    _restart(report, nodes)


def _hot_prompt(report: Report, nodes: int) -> None:
    """Compare how many servers a prompt's pages keep busy if all nodes read them in one order."""
    case = "first token of one prompt that every node reads"
    hot = base(
        nodes=nodes,
        sessions=0,
        seconds=120.0,
        warm_up=1.0,
        hot_prompt_at=AT,
        hot_prompt_tokens=HOT_TOKENS,
    )
    shards = hot.replace(layout="shards")
    busy = {
        "one loop per node": (shards, float(ONE_LOOP)),
        "shards": (shards, hot_servers(shards)),
        "cluster": (hot, hot_servers(hot)),
        "shards, each node in its own order": (shards, float(shards.servers)),
    }
    for name, (scenario, servers) in busy.items():
        alone = _slowest(scenario.replace(nodes=1))
        together = _slowest(scenario.replace(hot_servers=servers))
        report.record(case, f"{name}: one node", alone)
        report.record(case, f"{name}: all nodes", together)
        report.facts.setdefault("hot_prompt", {})[name] = {
            "busy_servers": servers,
            "servers": scenario.servers,
            "times_one_node": together / alone,
        }
    times = {name: fact["times_one_node"] for name, fact in report.facts["hot_prompt"].items()}
    report.figures |= {
        "scale_hot_prompt_x": times["shards"],
        "scale_hot_prompt_x_cluster": times["cluster"],
        "scale_hot_prompt_x_one_loop": times["one loop per node"],
        "scale_hot_prompt_x_own_order": times["shards, each node in its own order"],
    }
    report.panels.append(Panel(f"{case}, {nodes} nodes", "s", {"": case}))


def _slowest(scenario: Scenario) -> float:
    served = simulate(scenario, keep_requests=True).served
    times = sorted(one.first_token for one in served if one.hot)
    return times[int(0.99 * (len(times) - 1))]


def _restart(report: Report, nodes: int) -> None:
    """Simulate a restart: all nodes lose device and host pools; disks keep their pages.

    Each node then reads its sessions back from its nearest tier, or from both tiers.
    """
    for name, balance in (("nearest tier", False), ("both tiers", True)):
        scenario = base(
            nodes=nodes,
            workload="agentic",
            seconds=240.0,
            warm_up=30.0,
            restart_at=30.0 + AT,
            balance_loads=balance,
        )
        served = simulate(scenario, agents(), keep_requests=True).served
        normal = _p95([one for one in served if 30.0 <= one.arrived < 30.0 + AT])
        worst, back = normal, 0.0
        for start in range(int(30 + AT), 260, int(WINDOW)):
            window = [one for one in served if start <= one.arrived < start + WINDOW]
            if not window:
                continue
            value = _p95(window)
            report.record(f"{start - 30 - int(AT)} s after a restart", name, value)
            worst = max(worst, value)
            if value > 1.25 * normal:
                back = start + WINDOW - 30 - AT
        report.record("before a restart", name, normal)
        key = "" if not balance else "_both_tiers"
        report.figures |= {
            f"scale_restart_s{key}": back,
            f"scale_restart_worst_x{key}": worst / normal,
        }
    cases = {case.split(" after")[0]: case for case in report.runs if "a restart" in case}
    report.panels.append(
        Panel(
            f"95th percentile of the first token after {nodes} nodes restart",
            "s",
            cases,
            lines=True,
        )
    )


def _p95(served: list[Served]) -> float:
    if len(served) < 2:
        return max((one.first_token for one in served), default=0.0)
    return statistics.quantiles([one.first_token for one in served], n=20)[-1]
