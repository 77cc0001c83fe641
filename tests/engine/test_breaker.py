"""The circuit breaker's three states."""

import time

import pytest

from memkv_sglang.engine.breaker import BreakerState, BreakerTier, CircuitBreaker
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import CountingTier, FaultyTier

CHAIN = make_chain(make_namespace(), 3)
HOUR = 3600.0


def test_opens_after_failures_in_a_row_only() -> None:
    breaker = CircuitBreaker("minio", failures=3, open_seconds=HOUR)
    for failures in (1, 1, 0, 1, 1):
        breaker.record(failures)
    assert breaker.admit()
    breaker.record(1)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admit()


def test_half_open_lets_one_call_through() -> None:
    breaker = CircuitBreaker("minio", failures=1, open_seconds=0.05)
    breaker.record(1)
    while breaker.state is BreakerState.OPEN:
        time.sleep(0.005)
    breaker._open_seconds = HOUR
    assert [breaker.admit() for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize(("failures", "after"), [(0, BreakerState.CLOSED), (1, BreakerState.OPEN)])
def test_probe_decides(failures: int, after: BreakerState) -> None:
    breaker = CircuitBreaker("minio", failures=3, open_seconds=0.0)
    breaker.record(3)
    assert breaker.admit()
    breaker._open_seconds = HOUR
    breaker.record(failures)
    assert breaker.state is after
    assert breaker.admit() == (after is BreakerState.CLOSED)


def test_open_circuit_keeps_calls_from_the_tier() -> None:
    counting = CountingTier(FaultyTier(MemoryTier(), lambda verb, key: True))
    tier = BreakerTier(counting, CircuitBreaker("minio", failures=2, open_seconds=HOUR))
    for _ in range(2):
        with pytest.raises(TierError):
            tier.lookup(CHAIN, soon())
    asked = counting.calls.total()
    pages = [make_page(key, (8,), filled=False) for key in CHAIN.keys()]
    assert tier.load(pages, soon()) == [LoadResult.FAILED] * 3
    assert tier.spill(pages, soon()) == [SpillResult.FAILED] * 3
    with pytest.raises(TierError):
        tier.lookup(CHAIN, soon())
    with pytest.raises(TierError):
        tier.present(CHAIN.keys(), soon())
    assert counting.calls.total() == asked


def test_misses_are_no_failures() -> None:
    tier = BreakerTier(MemoryTier(), CircuitBreaker("minio", failures=1, open_seconds=HOUR))
    assert tier.lookup(CHAIN, soon()).length == 0
    page = make_page(CHAIN.keys()[0], (8,), filled=False)
    assert tier.load([page], soon()) == [LoadResult.MISSING]
    spill(tier, CHAIN.keys())
    load(tier, CHAIN.keys())
    assert tier.breaker.state is BreakerState.CLOSED
