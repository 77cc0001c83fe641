"""The simulator decides like the product, and coarse runs like single pages."""

from pathlib import Path

import pytest

from benchmarks.trace.product import ProductCache
from benchmarks.trace.requests import TRACE, mooncake
from memkv_sglang.planning.calibration import measured, published
from memkv_sglang.planning.cluster import agentic_templates, simulate
from memkv_sglang.planning.replay import Tiers, replay
from memkv_sglang.planning.scenario import Scenario, make_scenario
from memkv_sglang.planning.traces import Trace, read_trace

AGENTIC = Path(TRACE).parent / "agentic-dev.jsonl.gz"


@pytest.fixture(scope="module")
def agents() -> Trace:
    whole = read_trace(AGENTIC)
    # The sessions of the first hour compete for space.
    return whole._replace(requests=[one for one in whole.requests if one.seconds < 3600][:350])


@pytest.mark.parametrize("share", [pytest.param(5, marks=pytest.mark.slow), 20])
def test_hit_curves_equal_those_of_the_replay_benchmark(share: int) -> None:
    workload = mooncake()
    pages = workload.pages * share // 100
    expected = sum(map(ProductCache(pages).request, workload.requests))
    found = replay(read_trace(TRACE), Tiers(0, pages, 0))
    assert (found.nvme, found.ideal) == (expected, workload.ideal_hits)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_runs_of_pages_hit_like_single_pages(agents: Trace, share: float) -> None:
    pages = int(agents.pages * share / 4)
    exact, coarse = (
        replay(agents, Tiers(0, pages, float("inf")), nodes=4, run=size) for size in (1, 32)
    )
    assert coarse.total == pytest.approx(exact.total, rel=0.01)
    assert coarse.nvme == pytest.approx(exact.nvme, abs=0.01 * exact.total)


def _scenario(**changes: object) -> Scenario:
    values = {
        "servers": 4,
        "sessions": 24,
        "workload": "agentic",
        "think_scale": 0.1,
        "host_bytes": 2e11,
        "nvme_bytes": 1.5e12,
        "seconds": 60.0,
        "warm_up": 20.0,
        "router": "round_robin",
    }
    return make_scenario(
        published(), measured(), model="llama-70b", nodes=2, changes={**values, **changes}
    )


def test_a_simulation_repeats_exactly() -> None:
    templates = agentic_templates(AGENTIC)[:12]
    first, second = (simulate(_scenario(), templates) for _ in range(2))
    assert first == second
    assert first.requests > 50
    assert simulate(_scenario(seed=2), templates) != first


def test_a_cluster_hits_alike_with_runs_and_with_pages() -> None:
    templates = agentic_templates(AGENTIC)[:12]
    exact, coarse = (simulate(_scenario(run_pages=run), templates) for run in (1, 32))
    for tier, share in exact.hits.items():
        assert coarse.hits[tier] == pytest.approx(share, abs=0.01)


def test_every_input_is_in_the_output() -> None:
    scenario = _scenario(seconds=5.0, warm_up=1.0)
    told = simulate(scenario, agentic_templates(AGENTIC)[:3]).summary()["scenario"]
    assert set(told) == set(Scenario.__struct_fields__)
    assert told["seed"] == 1
