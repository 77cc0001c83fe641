"""The circuit breaker's three states."""

import time
from collections.abc import Sequence

import pytest

from memkv_sglang.engine.breaker import BreakerState, BreakerTier, CircuitBreaker
from memkv_sglang.page import Chain, Page
from memkv_sglang.testing.conformance import load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, TierError
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import CountingTier, FaultyTier, WrapperTier

CHAIN = make_chain(make_namespace(), 3)
HOUR = 3600.0


def opened(failures: int, open_seconds: float) -> CircuitBreaker:
    breaker = CircuitBreaker("minio", failures, open_seconds)
    for _ in range(failures):
        breaker.record(False)
    return breaker


def test_opens_only_after_consecutive_failures() -> None:
    breaker = CircuitBreaker("minio", failures=3, open_seconds=HOUR)
    for verdict in (False, False, True, False, None, False):
        breaker.record(verdict)
    assert breaker.admit()
    breaker.record(False)
    assert breaker.state is BreakerState.OPEN
    assert not breaker.admit()


def test_half_open_admits_one_call() -> None:
    breaker = opened(1, open_seconds=0.05)
    while breaker.state is BreakerState.OPEN:
        time.sleep(0.005)
    breaker._open_seconds = HOUR
    assert [breaker.admit() for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("verdict", "after"),
    [
        (True, BreakerState.CLOSED),
        (False, BreakerState.OPEN),
        (None, BreakerState.HALF_OPEN),
    ],
)
def test_probe_decides(verdict: bool | None, after: BreakerState) -> None:
    breaker = opened(3, open_seconds=0.0)
    assert breaker.admit()
    breaker._open_seconds = HOUR
    breaker.record(verdict)
    assert breaker.state is after
    assert breaker.admit() == (after is not BreakerState.OPEN)


class LateTier(WrapperTier):
    """Never answers a lookup in time and fails every load, but keeps its cached knowledge."""

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        whole = super().lookup(chain, deadline)
        return whole if whole.length == len(chain.hashes) else Lookup(0, complete=False)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        skipped = [Fetched(LoadResult.SKIPPED)] * (len(pages) - 1)
        return [Fetched(LoadResult.FAILED), *skipped]


def test_lookups_that_run_out_of_time_open_the_circuit() -> None:
    breaker = CircuitBreaker("minio", failures=3, open_seconds=HOUR)
    tier = BreakerTier(LateTier(MemoryTier()), breaker)
    for _ in range(3):
        tier.lookup(CHAIN, soon())
    assert breaker.state is BreakerState.OPEN


def test_answers_from_the_presence_cache_do_not_hide_failures() -> None:
    """A chain that is known to be present is found, although no load of it succeeds."""
    breaker = CircuitBreaker("minio", failures=3, open_seconds=HOUR)
    tier = BreakerTier(LateTier(MemoryTier()), breaker)
    spill(tier, CHAIN.keys())
    for _ in range(3):
        assert tier.lookup(CHAIN, soon()).length == 3
        assert spill(tier, CHAIN.keys()) == [SpillResult.PRESENT] * 3
        tier.load([make_page(key, (8,), filled=False) for key in CHAIN.keys()], soon())
    assert breaker.state is BreakerState.OPEN


def test_open_circuit_blocks_calls() -> None:
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


def test_misses_are_not_failures() -> None:
    tier = BreakerTier(MemoryTier(), CircuitBreaker("minio", failures=1, open_seconds=HOUR))
    assert tier.lookup(CHAIN, soon()).length == 0
    page = make_page(CHAIN.keys()[0], (8,), filled=False)
    assert tier.load([page], soon()) == [LoadResult.MISSING]
    spill(tier, CHAIN.keys())
    load(tier, CHAIN.keys())
    assert tier.breaker.state is BreakerState.CLOSED
