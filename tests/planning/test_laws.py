"""Laws that the simulator's parts must obey, whatever the numbers of a calibration."""

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from memkv_sglang.planning.calibration import PrefillCost, StepCost, measured, published
from memkv_sglang.planning.cluster import simulate
from memkv_sglang.planning.events import EventLoop
from memkv_sglang.planning.fabric import Fabric
from memkv_sglang.planning.fairness import Floats, Ints, max_min
from memkv_sglang.planning.gpu import Job, Replica
from memkv_sglang.planning.scenario import make_scenario
from memkv_sglang.planning.workload import Think


def test_a_replica_with_random_arrivals_waits_like_an_m_m_1_queue() -> None:
    """Mean time in the system: 1 / (service rate - arrival rate)."""
    rng, loop = random.Random(5), EventLoop()
    arrivals, services = 0.7, 1.0
    # Prompts longer than a batch, so that each is served alone.
    replica = Replica(loop, PrefillCost(0.0, 1e-6, 0.0), StepCost(1e-9, 0.0), 1e12)
    times: list[float] = []

    def arrive() -> None:
        began = loop.now
        job = Job(
            new=1e6 * rng.expovariate(services) + 20_000,
            cached=0,
            output=0,
            first_token=lambda: times.append(loop.now - began),
            done=lambda: None,
        )
        replica.submit(job)
        loop.after(rng.expovariate(arrivals), arrive)

    arrive()
    loop.run(60_000)
    # The 20,000 tokens make the service a little longer and less variable (Pollaczek-Khinchine).
    mean, second = 1.02, 1 + 1.02**2
    wait = arrivals * second / (2 * (1 - arrivals * mean))
    assert np.mean(times) == pytest.approx(mean + wait, rel=0.05)


@pytest.mark.parametrize("sizes", ["exponential", "constant", "two kinds"])
def test_a_shared_link_is_processor_sharing_for_any_sizes(sizes: str) -> None:
    """The mean time in the system matches M/M/1, whatever the distribution of sizes."""
    rng, loop = random.Random(3), EventLoop()
    fabric = Fabric(loop)
    route = fabric.add_route({fabric.add_link("link", 1.0): 1.0})
    draws: dict[str, Callable[[], float]] = {
        "exponential": lambda: rng.expovariate(1.0),
        "constant": lambda: 1.0,
        "two kinds": lambda: 0.5 if rng.random() < 0.9 else 5.5,
    }
    draw = draws[sizes]
    times: list[float] = []

    def arrive() -> None:
        began = loop.now
        fabric.send(route, draw(), lambda: times.append(loop.now - began))
        loop.after(rng.expovariate(0.6), arrive)

    arrive()
    loop.run(15_000)
    assert np.mean(times) == pytest.approx(1 / (1 - 0.6), rel=0.1)


def _by_solver(counts: Floats, links: Ints, uses: Floats, capacities: Floats) -> Floats:
    """Return max-min fair rates by a sequence of linear programs."""
    n, m = len(counts), len(capacities)
    taken = np.zeros((m, n))
    for i in range(n):
        for link, use in zip(links[i], uses[i], strict=True):
            taken[link, i] += use * counts[i]
    finite = np.isfinite(capacities)
    fixed: dict[int, float] = {}
    while len(fixed) < n:
        free = [i for i in range(n) if i not in fixed]
        left = capacities[finite] - taken[finite][:, list(fixed)] @ np.array(
            [fixed[i] for i in fixed]
        )
        # Maximize t with every free rate at least t, then see whose rate cannot be larger.
        raised = np.hstack([taken[finite][:, free], np.zeros((finite.sum(), 1))])
        order = np.hstack([-np.eye(len(free)), np.ones((len(free), 1))])
        above = np.vstack([raised, order])
        bounds = np.concatenate([left, np.zeros(len(free))])
        goal = np.zeros(len(free) + 1)
        goal[-1] = -1
        level = -linprog(goal, A_ub=above, b_ub=bounds, method="highs").fun
        for i, each in enumerate(free):
            most = np.zeros(len(free) + 1)
            most[i] = -1
            floor = [(level * (1 - 1e-9), None)] * len(free) + [(0, None)]
            rate = -linprog(most, A_ub=raised, b_ub=left, bounds=floor, method="highs").fun
            if rate <= level * (1 + 1e-6):
                fixed[each] = level
    return np.array([fixed[i] for i in range(n)])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_shares_are_max_min_fair_as_a_solver_finds_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, m, k = int(rng.integers(1, 6)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    counts = rng.integers(1, 5, n).astype(float)
    links = np.stack([rng.choice(m + 1, k, replace=k > m + 1) for _ in range(n)])
    links[:, 0] = rng.integers(0, m, n)  # at least one finite link
    uses = rng.uniform(0.2, 2.0, (n, k))
    capacities = np.append(rng.uniform(1, 10, m), np.inf)
    found = max_min(counts, links, uses, capacities)
    assert found == pytest.approx(_by_solver(counts, links, uses, capacities), rel=1e-4)


def test_a_flow_without_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        max_min(np.ones(1), np.array([[0]]), np.ones((1, 1)), np.array([np.inf]))


def test_flows_in_steps_take_at_most_two_steps_longer() -> None:
    def ends(quantum: float) -> list[float]:
        rng, loop = random.Random(9), EventLoop()
        fabric = Fabric(loop, quantum)
        spine = fabric.add_link("spine", 10.0)
        routes = [fabric.add_route({fabric.add_link("n", 4.0): 1.0, spine: 1.0}) for _ in range(6)]
        done: dict[int, float] = {}
        for i in range(200):
            route, size, at = rng.choice(routes), rng.uniform(0.5, 3), rng.uniform(0, 100)
            end = partial(lambda i: done.__setitem__(i, loop.now), i)
            loop.at(at, partial(fabric.send, route, size, end))
        loop.run(300)
        return [done[i] for i in range(200)]

    late = [stepped - exact for stepped, exact in zip(ends(0.01), ends(0.0), strict=True)]
    assert np.mean(late) == pytest.approx(0.01, abs=0.01)
    assert max(late) < 0.1


def test_no_byte_is_lost() -> None:
    loop = EventLoop()
    fabric = Fabric(loop)
    link = fabric.add_link("link", 5.0)
    route = fabric.add_route({link: 2.0})
    for _ in range(7):
        fabric.send(route, 10.0, lambda: None)
    loop.run(1000)
    assert fabric.bytes_moved(route) == pytest.approx(70)
    assert fabric.use_by_link() == {"link": pytest.approx(70 * 2 / 5)}


def test_decode_waits_while_another_prompt_is_computed() -> None:
    loop = EventLoop()
    replica = Replica(loop, PrefillCost(0.0, 1.0, 0.0), StepCost(1.0, 0.0), 1e9)
    ends: dict[str, float] = {}

    def job(name: str, new: float, output: float) -> Job:
        return Job(new, 0, output, lambda: None, lambda: ends.__setitem__(name, loop.now))

    replica.submit(job("first", 2, 10))  # computed until 2, then decodes 10 steps
    loop.at(5, lambda: replica.submit(job("second", 4, 1)))  # computed from 5 to 9
    loop.run(100)
    assert ends == {"first": pytest.approx(16), "second": pytest.approx(10)}
    assert replica.prefill_seconds == pytest.approx(6)


def test_a_job_waits_for_device_memory() -> None:
    loop = EventLoop()
    replica = Replica(loop, PrefillCost(0.0, 1.0, 0.0), StepCost(1.0, 0.0), 100)
    firsts: list[float] = []
    for _ in range(2):
        replica.submit(Job(50, 0, 10, lambda: firsts.append(loop.now), lambda: None))
    loop.run(1000)
    assert firsts == [50, 110]  # the second one starts when the first one has ended


def test_both_tiers_load_faster_than_a_slow_disk() -> None:
    """Pages that are on disk too come from the servers while the disk is the bottleneck."""
    steady = make_scenario(
        published(),
        measured(),
        model="llama-70b",
        changes={
            "servers": 2,
            "sessions": 24,
            "context": 32_768,
            "device_tokens": 300_000,
            "host_bytes": 0.0,
            "think": Think(10.0, 16.5),
            "run_pages": 64,
            "nvme_read": 10e9,
            "seconds": 60.0,
            "warm_up": 30.0,
        },
    )
    nearest, both = (simulate(steady.replace(balance_loads=one)) for one in (False, True))
    assert both.first_token_p50 < 0.9 * nearest.first_token_p50
    assert nearest.hits["minio"] == 0 < both.hits["minio"]
    assert both.hits["computed"] <= nearest.hits["computed"]
