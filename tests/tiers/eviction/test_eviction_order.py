"""What the eviction order remembers, and how it chooses what a repeated use is worth."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.eviction.ghost_list import GhostList
from memkv_sglang.tiers.eviction.order import EvictionOrder
from memkv_sglang.tiers.eviction.reuse_policy import MOST_USES, VALUATIONS, ReusePolicy
from memkv_sglang.tiers.eviction.shadow import SAMPLE_PAGES, Shadow

NAMESPACE = make_namespace()

STEPS = ("use", "touch", "spill", "adapt", "scan", "evict", "remove")


def add(order: EvictionOrder, keys: list[PageKey], first: int) -> list[int]:
    entries = list(range(first, first + len(keys)))
    tick = order.take(len(keys))
    for i, entry in enumerate(entries):
        order.set(entry, tick + len(keys) - 1 - i)
    order.enter(list(zip(keys, entries, strict=True)))
    return entries


def by_rank(order: EvictionOrder, entries: list[int]) -> list[int]:
    return [entry for _, entry in order.coldest([entries], lambda _: True, len(entries))]


def test_leaf_goes_first_and_a_use_makes_young() -> None:
    order = EvictionOrder()
    one, two = make_chain(NAMESPACE, 3, "one"), make_chain(NAMESPACE, 3, "two")
    entries = add(order, one.keys(), 0) + add(order, two.keys(), 3)
    assert by_rank(order, entries) == [2, 1, 0, 5, 4, 3]
    order.use(one.namespace, one.hashes, [0, 1, 2])
    assert by_rank(order, entries) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("valuation", VALUATIONS, ids=lambda valuation: valuation.name)
def test_chain_that_came_in_parts_leaves_leaf_first(valuation: ReusePolicy) -> None:
    """Though its end was there before, and was used then."""
    order = EvictionOrder()
    chain = make_chain(NAMESPACE, 6)
    entries = add(order, chain.keys()[:3], 0) + add(order, chain.keys()[3:], 3)
    order.use(chain.namespace, chain.hashes[3:], entries[3:])
    order._bonuses = valuation.bonuses(len(entries))
    order.touch(entries)
    assert by_rank(order, entries) == entries[::-1]


@pytest.mark.parametrize("valuation", VALUATIONS, ids=lambda valuation: valuation.name)
def test_more_uses_are_never_worth_less(valuation: ReusePolicy) -> None:
    bonuses = valuation.bonuses(1000)
    assert len(bonuses) == MOST_USES + 1
    assert bonuses == sorted(bonuses)


class SettlesAtOnce(EvictionOrder):
    """Works in every use when it is noted, as if lookups had the time."""

    def _note(self, *use: Any) -> int:
        first = super()._note(*use)
        self.settle()
        return first


@given(st.data())
def test_uses_that_wait_change_no_decision(data: st.DataObject) -> None:
    waits, at_once = orders = EvictionOrder(), SettlesAtOnce()
    chain = make_chain(NAMESPACE, 12)
    entries: list[int] = []  # of the chain's first pages; the rest are not there
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=20)):
        if step in ("use", "touch"):
            used = entries[: data.draw(st.integers(0, len(entries)))]
            for order in orders:
                if step == "use":
                    order.use(chain.namespace, chain.hashes, used)
                else:
                    order.touch(used)
        elif step == "spill":
            for order in orders:
                add(order, chain.keys()[len(entries) :], len(entries))
            entries = list(range(len(chain.hashes)))
        elif step == "adapt":
            for order in orders:
                order.adapt(4)
        elif step == "scan":
            chosen = [order.coldest([entries], lambda _: True, 5) for order in orders]
            assert chosen[0] == chosen[1]
        else:
            keep = data.draw(st.integers(0, len(entries)))
            for order in orders if step == "evict" else ():
                order.leave(list(zip(chain.keys()[keep:], entries[keep:], strict=False)))
            del entries[keep:]  # which the next spill uses again
    assert [waits.tick(e) for e in entries] == [at_once.tick(e) for e in entries]
    assert [waits.rank(e) for e in entries] == [at_once.rank(e) for e in entries]
    assert waits.take(1) == at_once.take(1)


def test_uses_that_wait_are_few() -> None:
    order, chain = EvictionOrder(), make_chain(NAMESPACE, 4096)
    entries = add(order, chain.keys(), 0)
    for _ in range(20):
        order.use(chain.namespace, chain.hashes, entries)
    assert sum(len(use.entries) for use in order._noted) <= 1 << 16
    assert by_rank(order, entries) == entries[::-1]
    assert not order.is_behind


def test_uses_are_counted_to_a_limit_without_harm() -> None:
    order = EvictionOrder()
    chain = make_chain(NAMESPACE, 2)
    entries = add(order, chain.keys(), 0)
    for _ in range(MOST_USES + 50):
        order.use(chain.namespace, chain.hashes, entries)
    assert by_rank(order, entries) == [1, 0]


def test_page_that_is_back_counts_its_earlier_uses_and_so_do_those_before_it() -> None:
    order = EvictionOrder()
    keys = make_chain(NAMESPACE, 3).keys()
    entries = add(order, keys, 0)
    order.adapt(8)
    order.leave([(keys[2], entries[2])])
    assert list(order._uses) == [0, 0, 0]
    back = add(order, keys, 3)
    assert [order._uses[entry] for entry in back] == [1, 1, 1]


def test_ghosts_remember_as_many_pages_as_they_have_room_for() -> None:
    ghosts = GhostList(800)
    rng = random.Random(1)
    numbers = [rng.getrandbits(64) for _ in range(400)]
    for uses, number in enumerate(numbers):
        ghosts.add(number, uses % 200)
    known = [ghosts.take(number) for number in numbers]
    assert sum(found is not None for found in known) > 380
    assert all(found in (None, uses % 200) for uses, found in enumerate(known))
    assert [ghosts.take(number) for number in numbers] == [None] * 400


def test_shadow_follows_what_brings_hits() -> None:
    shadow = Shadow()
    shadow.resize(100)
    assert shadow.choose().name == "recency"
    wanted, passing = list(range(60)), iter(range(1000, 10**9))
    for _ in range(40):
        shadow.use(wanted)
        shadow.use(next(passing) for _ in range(90))
    assert shadow.choose().name != "recency"


def test_sample_stays_small() -> None:
    shadow = Shadow()
    shadow.use(range(20 * SAMPLE_PAGES))
    shadow.resize(100 * SAMPLE_PAGES)
    assert shadow.mask == 127
    assert all(len(cache._ranks) <= SAMPLE_PAGES for cache in shadow.caches)
