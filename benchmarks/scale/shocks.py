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
SLOW = 1.25
"""A window after a restart is normal if it is at most this factor slower than without one."""
NO_RESTART = "no restart"
SHOWN = 60
"""Seconds around a restart to draw."""
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

    Each node then reads its sessions back from its nearest tier, or from both tiers. Windows of
    time are compared with the same ones without a restart, because they differ by what arrives.
    """
    steady = base(nodes=nodes, workload="agentic", seconds=240.0, warm_up=30.0)
    restarted = steady.replace(restart_at=30.0 + AT)
    windows = {
        NO_RESTART: _windows(steady),
        "nearest tier": _windows(restarted),
        "both tiers": _windows(restarted.replace(balance_loads=True)),
    }
    for name, values in windows.items():
        for start, value in values.items():
            report.record(f"{start} s after a restart", name, value)
        slower = {
            start: value / windows[NO_RESTART][start]
            for start, value in values.items()
            if start >= 0 and start in windows[NO_RESTART]
        }
        normal = [start for start, factor in slower.items() if factor <= SLOW]
        if name != NO_RESTART:
            key = "" if name == "nearest tier" else "_both_tiers"
            report.figures |= {
                f"scale_restart_s{key}": next(iter(normal), max(slower)),
                f"scale_restart_worst_x{key}": max(slower.values()),
            }
    cases = {
        f"{start:g}": f"{start} s after a restart"
        for start in windows[NO_RESTART]
        if -SHOWN <= start <= SHOWN
    }
    report.panels.append(
        Panel(f"95th percentile of the first token, {nodes} nodes restart", "s", cases, lines=True)
    )


def _windows(scenario: Scenario) -> dict[int, float]:
    """Return the 95th percentile of the time to first token by seconds since the restart."""
    served = simulate(scenario, agents(), keep_requests=True).served
    found: dict[int, list[Served]] = {}
    for one in served:
        start = int((one.arrived - 30.0 - AT) // WINDOW * WINDOW)
        found.setdefault(start, []).append(one)
    return {start: _p95(found[start]) for start in sorted(found) if -AT <= start < 170}


def _p95(served: list[Served]) -> float:
    if len(served) < 2:
        return max((one.first_token for one in served), default=0.0)
    return statistics.quantiles([one.first_token for one in served], n=20)[-1]
