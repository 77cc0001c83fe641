"""Scenarios that the parts of this benchmark share."""

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import click

from benchmarks.trace.requests import TRACE
from memkv_sglang.planning.calibration import Measured, Published, measured, published
from memkv_sglang.planning.cluster import agentic_templates
from memkv_sglang.planning.events import EventLoop
from memkv_sglang.planning.fabric import Fabric
from memkv_sglang.planning.scenario import Scenario, make_scenario
from memkv_sglang.planning.storage import build_links
from memkv_sglang.planning.workload import Template

SESSIONS_PER_NODE = 128
"""Sessions per node in the headline: 16,000 on 125 nodes."""
SERVERS_PER_NODE = 2
FLOWS = 64


def tell(text: str) -> None:
    """Print the current step."""
    click.echo(time.strftime("%H:%M:%S ") + text, err=True)


@cache
def numbers() -> tuple[Published, Measured]:
    """Return the calibration."""
    return published(), measured()


@cache
def agents() -> Sequence[Template]:
    """Return the sessions of coding agents (`benchmarks/traces`)."""
    return agentic_templates(TRACE.parent / "agentic-dev.jsonl.gz")


def base(model: str = "llama-70b", nodes: int = 1, **changes: Any) -> Scenario:
    """Return the headline's scenario: a 70B model on nodes of eight H200, with two servers each."""
    values = {"servers": SERVERS_PER_NODE * nodes, "sessions": SESSIONS_PER_NODE * nodes}
    return make_scenario(*numbers(), model=model, nodes=nodes, changes={**values, **changes})


def node_rate(scenario: Scenario) -> tuple[float, str]:
    """Return the bytes per second that one node loads from the servers, and what limits it."""
    loop = EventLoop()
    fabric = Fabric(loop)
    route = build_links(fabric, scenario)[0].get
    size, ends = 1e9, list[float]()
    for _ in range(FLOWS):
        fabric.send(route, size, lambda: ends.append(loop.now))
    loop.run(1e6)
    use = fabric.use_by_link()
    return FLOWS * size / ends[-1], max(use, key=use.__getitem__)
