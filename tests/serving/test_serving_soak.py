"""Three minutes of mixed traffic leave nothing behind: host pages, file descriptors, memory."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_cpu_platform.process import group_members

from tests.serving.conftest import Cluster
from tests.serving.node import DEVICE_TOKENS, Node, prompt, whole_pages
from tests.serving.traffic import PROMPTS, Expected, Traffic

SECONDS = 150.0
"""Seconds of traffic after a warm-up of half a minute."""
LEAK = 48 << 20
"""Limit of growth in bytes, which requests that leaked their pages or results would exceed."""
FILES = 16
"""Limit of new descriptors: above the chance growth of pools, below a leak in one of fifty
requests."""


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> Expected:
    return {i: [cluster.recompute(tokens)] for i, tokens in enumerate(PROMPTS)}


def processes(node: Node) -> list[int]:
    return [*group_members(node.server_pid), node.agent_pid()]


def descriptors(node: Node) -> int:
    return sum(1 for pid in processes(node) for _ in Path(f"/proc/{pid}/fd").iterdir())


def private_memory(node: Node) -> int:
    def of_process(pid: int) -> Iterator[int]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                yield int(line.split()[1]) << 10

    return sum(sum(of_process(pid)) for pid in processes(node))


@pytest.mark.timeout(400)
@pytest.mark.soak
def test_mixed_traffic_leaves_nothing_behind(cluster: Cluster, expected: Expected) -> None:
    nodes = [cluster.a, cluster.b]
    with Traffic(nodes, expected) as traffic:
        traffic.goes_on(150)  # by now pools, connections and caches have reached their full size
    before = [(descriptors(node), private_memory(node)) for node in nodes]
    begin = time.monotonic()
    with Traffic(nodes, expected) as traffic:
        while time.monotonic() < begin + SECONDS:
            traffic.goes_on()
    for node, (files, memory) in zip(nodes, before, strict=True):
        assert descriptors(node) <= files + FILES
        assert private_memory(node) <= memory + LEAK
    # Keep half of the host pool free, or loads would be shortened or skipped.
    large = prompt("after the soak", DEVICE_TOKENS - 200)
    computed = cluster.a.generate(large).output_ids
    cluster.a.share()
    answer = cluster.b.generate(large)
    assert answer.cached_by_source["storage"] == whole_pages(len(large) - 1)
    assert answer.output_ids == computed
