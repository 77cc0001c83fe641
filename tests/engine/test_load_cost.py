"""Lookups omit pages that are slower to load than to recompute."""

import logging
import time
from collections.abc import Iterator
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine import load_cost as worth
from memkv_sglang.engine import speed
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.load_cost import CALL_PAGES, LoadCostPolicy, Part
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.speed import TierSpeed
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import SlowTier

NAMESPACE = make_namespace()
LENGTHS = (4096, 4096)
PAGE = sum(LENGTHS)
SLOW = 0.3
"""Seconds that a call to the slowed tier takes."""

DEAR, CHEAP = Recompute(60.0, PAGE), Recompute(SLOW / 1000, PAGE)
"""Pages that take longer to compute than any load here, and pages that take hardly any time."""


class SlowedNode:
    """An engine with a shared tier of a given slowness that holds 12 pages, and a disk with 4."""

    def __init__(self, *, skip_slow_loads: bool = True) -> None:
        self.registry = CollectorRegistry()
        local, shared = MemoryTier(name="local"), MemoryTier(name="shared")
        self.slow = SlowTier(shared, 0)
        self.chain = make_chain(NAMESPACE, 12)
        pages = [make_page(key, LENGTHS, filled=True) for key in self.chain.keys()]
        shared.spill(pages, time.monotonic() + 60)
        local.spill(pages[:4], time.monotonic() + 60)
        config = EngineConfig(promote="never", skip_slow_loads=skip_slow_loads)
        self.engine = Engine(local, self.slow, local, config, Metrics(self.registry))

    def measure(self, seconds: float) -> None:
        """Slow the tier down, and let the engine measure it."""
        self.slow.seconds = seconds
        assert self.load(12) == [LoadResult.LOADED] * 12
        assert self.load(6) == [LoadResult.LOADED] * 6

    def load(self, pages: int) -> list[LoadResult]:
        empty = [make_page(key, LENGTHS, filled=False) for key in self.chain.keys()[:pages]]
        return [load.result for load in self.engine.load(empty)]

    def ask(self, recompute: Recompute, chain: Chain | None = None) -> int:
        return self.engine.lookup(chain or self.chain, 10, recompute).length

    def declined(self) -> float:
        return self.registry.get_sample_value("memkv_skipped_slow_pages_total") or 0


@pytest.fixture
def node() -> Iterator[SlowedNode]:
    node = SlowedNode()
    yield node
    node.engine.close(drain=0)


def test_nothing_is_skipped_before_speeds_are_known(node: SlowedNode) -> None:
    assert node.ask(CHEAP) == 12
    node.measure(SLOW)
    assert node.ask(UNKNOWN) == 12
    assert node.declined() == 0


def test_lookup_returns_the_prefix_worth_loading(
    node: SlowedNode, caplog: pytest.LogCaptureFixture
) -> None:
    node.measure(SLOW)
    node.slow.seconds = 0
    with caplog.at_level(logging.WARNING, "memkv_sglang.engine.load_cost"):
        assert node.ask(DEAR) == 12
        # Only the first four pages are on the disk, and only those are worth loading.
        assert [node.ask(CHEAP) for _ in range(8)] == [4] * 8
        rest = Chain(node.chain.namespace, node.chain.hashes[4:])
        assert node.ask(CHEAP, rest) == 0
    assert node.declined() == 8 * 8 + 8
    assert len(caplog.records) == 1, "explained once"
    # Repeated lookups get the same answer for a while, whatever has been measured since.
    node.measure(0)
    assert node.ask(CHEAP) == 4


def test_slow_tier_is_tried_again(node: SlowedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MIN_HALF_LIFE", 0.02)
    monkeypatch.setattr(worth, "DECISION_TTL", 0.02)
    node.measure(SLOW)
    node.slow.seconds = 0
    assert node.ask(CHEAP) == 4
    deadline = time.monotonic() + 30
    while node.ask(CHEAP) < 12:
        assert time.monotonic() < deadline, "never tried again"
    monkeypatch.setattr(speed, "MIN_HALF_LIFE", 1e9)
    for _ in range(30):
        node.load(12)
    assert node.ask(Recompute(SLOW, PAGE)) == 12, "fast again, and known to be"


def test_skipping_can_be_turned_off() -> None:
    node = SlowedNode(skip_slow_loads=False)
    try:
        node.measure(SLOW)
        assert node.ask(CHEAP) == 12
    finally:
        node.engine.close(drain=0)


def known(latency: float, byte_seconds: float) -> TierSpeed:
    """Return the estimate for a tier of this speed, at a frozen time."""
    now = [0.0]
    known = TierSpeed(lambda: now[0])
    for size in (PAGE, 100 * PAGE):
        known.begin(size)
        now[0] += latency + byte_seconds * size
        known.end(size, size)
    return known


@given(
    st.lists(
        st.tuples(st.sampled_from(["near", "far"]), st.integers(0, CALL_PAGES // 4)), max_size=4
    ),
    st.tuples(st.floats(1e-4, 1), st.floats(1e-9, 1e-4)),
    st.tuples(st.floats(1e-4, 1), st.floats(1e-9, 1e-4)),
    st.floats(1e-6, 1),
)
def test_no_other_boundary_takes_less_time(
    parts: list[tuple[str, int]],
    near: tuple[float, float],
    far: tuple[float, float],
    page_seconds: float,
) -> None:
    costs = {"near": near, "far": far}
    places = [tier for tier, pages in parts for _ in range(pages)]

    def takes(length: int) -> float:
        """Return the time to load that many pages, in parallel, and then compute the rest."""
        counts = {tier: places[:length].count(tier) for tier in costs}
        loads = [costs[t][0] + costs[t][1] * n * PAGE for t, n in counts.items() if n]
        return max(loads, default=0) + page_seconds * (len(places) - length)

    judge = LoadCostPolicy(
        {tier: known(*cost) for tier, cost in costs.items()}, Metrics(CollectorRegistry())
    )
    chain = make_chain(NAMESPACE, max(1, len(places)))
    answer = judge.limit(chain, [Part(*part) for part in parts], Recompute(page_seconds, PAGE))
    ends = accumulate((pages for _, pages in parts), initial=0)
    best = min(takes(length) for length in ends)
    assert takes(answer) <= best * 1.001 + 1e-6
