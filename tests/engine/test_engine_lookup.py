"""Lookups across two tiers find the longest prefix that can be loaded."""

import pytest

from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, Lookup
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import FaultyTier
from tests.engine.engines import LOCAL, NAMESPACE, SHARED, Open, load, put


@pytest.mark.parametrize("on_disk", range(0, 13, 3))
@pytest.mark.parametrize("uploaded", range(0, 13, 4))
def test_lookup_is_page_exact_over_both_tiers(
    open_engine: Open, on_disk: int, uploaded: int
) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    chain = make_chain(NAMESPACE, 12)
    put(local, chain.keys()[:on_disk])
    put(shared, chain.keys()[:uploaded])
    engine = open_engine(local, shared)
    longest = max(on_disk, uploaded)
    assert engine.lookup(chain) == Lookup(longest, complete=True)
    loads = load(engine, chain.keys())
    assert [one.tier for one in loads[:on_disk]] == [LOCAL] * on_disk
    assert [one.tier for one in loads[on_disk:longest]] == [SHARED] * (longest - on_disk)
    assert {one.result for one in loads[longest:]} <= {LoadResult.MISSING, LoadResult.SKIPPED}


def test_lookup_continues_on_disk_where_the_shared_tier_ends(open_engine: Open) -> None:
    """The disk evicted the middle of the chain, and its end still waits for upload."""
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 12).keys()
    put(local, keys[:3] + keys[7:10])
    put(shared, keys[:7])
    engine = open_engine(local, shared)
    assert engine.lookup(make_chain(NAMESPACE, 12)) == Lookup(10, complete=True)
    assert [one.tier for one in load(engine, keys[:10])] == [LOCAL] * 3 + [SHARED] * 4 + [LOCAL] * 3


def test_roots_stay_younger_than_leaves_when_both_tiers_answer(open_engine: Open) -> None:
    local, shared = MemoryTier(capacity=6 * 8192, name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 12).keys()
    put(local, keys[:3] + keys[7:10])
    put(shared, keys[:7])
    open_engine(local, shared).lookup(make_chain(NAMESPACE, 12))
    put(local, make_chain(NAMESPACE, 3, "newcomer").keys())
    assert local.present(keys, 0)[:3] == [True] * 3


def test_lookup_of_an_unreachable_tier_is_a_lower_bound(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    chain = make_chain(NAMESPACE, 6)
    put(local, chain.keys()[:4])
    shared = FaultyTier(MemoryTier(name=SHARED), lambda verb, key: True)
    engine = open_engine(local, shared)
    assert engine.lookup(chain) == Lookup(4, complete=False)
