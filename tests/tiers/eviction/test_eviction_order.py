"""The eviction order, compared with a simple model, and how it chooses the reuse policy."""

import random
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_chain, make_hashes, make_namespace
from memkv_sglang.tiers.eviction.ghost_list import GhostList
from memkv_sglang.tiers.eviction.order import EvictionOrder
from memkv_sglang.tiers.eviction.policy_chooser import PolicyChooser
from memkv_sglang.tiers.eviction.reuse_policy import MOST_USES, REUSE_POLICIES, ReusePolicy
from memkv_sglang.tiers.eviction.shadow import SAMPLE_PAGES, Shadow

NAMESPACE = make_namespace()

STEPS = ("use", "touch", "spill", "adapt", "scan", "evict", "remove")

TIER_PAGES = 64
"""Pages of the tier that the model assumes for its bonuses; more than the test's chains have."""


def add(order: EvictionOrder, keys: list[PageKey], first: int) -> list[int]:
    entries = list(range(first, first + len(keys)))
    store(order, keys, entries)
    return entries


def store(order: EvictionOrder, keys: Sequence[PageKey], entries: Sequence[int]) -> None:
    tick = order.reserve_ticks(len(keys))
    for i, entry in enumerate(entries):
        order.set_tick(entry, tick + len(keys) - 1 - i)
    order.add(list(zip(keys, entries, strict=True)))


def by_rank(order: EvictionOrder, entries: list[int]) -> list[int]:
    return [entry for _, entry in order.coldest([entries], lambda _: True, len(entries))]


class ModelOrder:
    """The eviction order as the documentation describes it, without any optimization."""

    def __init__(self, policy: ReusePolicy) -> None:
        self.policy = policy
        self.clock = 0
        self.last_use: dict[bytes, int] = {}
        self.reuses: dict[bytes, int] = {}
        self.evicted: set[bytes] = set()

    def use(self, pages: Sequence[bytes]) -> None:
        self._make_recent(pages)
        for page in pages:
            self.reuses[page] = min(self.reuses[page] + 1, MOST_USES)

    def touch(self, pages: Sequence[bytes]) -> None:
        self._make_recent(pages)
        self._raise_to_descendants(pages)

    def spill(self, pages: Sequence[bytes]) -> None:
        self._make_recent(pages)
        for page in pages:
            self.reuses[page] = 1 if page in self.evicted else 0
        self._raise_to_descendants(pages)
        self.evicted.difference_update(pages)

    def remove(self, pages: Sequence[bytes], *, evicted: bool) -> None:
        for page in pages:
            del self.last_use[page], self.reuses[page]
        if evicted:
            self.evicted.update(pages)

    def eviction_order(self) -> list[bytes]:
        return sorted(self.last_use, key=self._score)

    def _make_recent(self, pages: Sequence[bytes]) -> None:
        for page in reversed(pages):
            self.clock += 1
            self.last_use[page] = self.clock

    def _raise_to_descendants(self, pages: Sequence[bytes]) -> None:
        for i, page in enumerate(pages):
            self.reuses[page] = max(self.reuses[descendant] for descendant in pages[i:])

    def _score(self, page: bytes) -> tuple[float, int]:
        counted = min(self.reuses[page], self.policy.most)
        if self.policy.lifetimes is None:
            return counted, self.last_use[page]
        return self.last_use[page] + counted * self.policy.lifetimes * TIER_PAGES, 0


class OrderedCache:
    """Drives an `EvictionOrder` like the NVMe tier does, and the model with the same calls."""

    def __init__(self, policy: ReusePolicy) -> None:
        self.order = EvictionOrder(PolicyChooser((policy,)))
        self.order.adapt(TIER_PAGES)
        self.model = ModelOrder(policy)
        self.entries: dict[bytes, int] = {}
        self.unused = list(range(TIER_PAGES))[::-1]

    def lookup(self, pages: Sequence[bytes]) -> None:
        found = list(takewhile(self.entries.__contains__, pages))
        self.order.use(NAMESPACE.digest, pages, [self.entries[page] for page in found])
        self.model.use(found)

    def spill(self, pages: Sequence[bytes]) -> None:
        present = [page for page in pages if page in self.entries]
        missing = [page for page in pages if page not in self.entries]
        # A new entry must be the next number: take unused ones from the lowest on.
        self.entries.update((page, self.unused.pop()) for page in missing)
        store(self.order, self._keys(missing), [self.entries[page] for page in missing])
        self.model.spill(missing)
        self.order.touch([self.entries[page] for page in present])
        self.model.touch(present)

    def evict(self, count: int) -> None:
        victims = self.eviction_order()[:count]
        pairs = zip(self._keys(victims), [self.entries[page] for page in victims], strict=True)
        self.order.remember_evicted(pairs)
        self._forget(victims, evicted=True)

    def remove(self, pages: Sequence[bytes]) -> None:
        self._forget([page for page in pages if page in self.entries], evicted=False)

    def eviction_order(self) -> list[bytes]:
        pages = {entry: page for page, entry in self.entries.items()}
        if not pages:
            return []
        return [pages[entry] for entry in by_rank(self.order, sorted(pages))]

    def _forget(self, pages: Sequence[bytes], *, evicted: bool) -> None:
        self.model.remove(pages, evicted=evicted)
        self.unused += sorted((self.entries.pop(page) for page in pages), reverse=True)

    def _keys(self, pages: Sequence[bytes]) -> list[PageKey]:
        return [PageKey(NAMESPACE.digest, page) for page in pages]


TRUNK = make_hashes(8, "trunk")
CHAINS = [
    TRUNK,
    [*TRUNK[:3], *make_hashes(8, "branch", TRUNK[2])],
    [*TRUNK[:6], *make_hashes(4, "twig", TRUNK[5])],
    make_hashes(9, "other"),
]


@settings(max_examples=100, deadline=None)
@given(st.data())
@pytest.mark.parametrize("policy", REUSE_POLICIES, ids=lambda policy: policy.name)
def test_order_agrees_with_the_model(policy: ReusePolicy, data: st.DataObject) -> None:
    cache = OrderedCache(policy)
    operations = st.sampled_from(("lookup", "spill", "spill", "evict", "remove"))
    for operation in data.draw(st.lists(operations, max_size=30)):
        chain = data.draw(st.sampled_from(CHAINS))
        length = data.draw(st.integers(0, len(chain)))
        if operation == "lookup":
            cache.lookup(chain[:length])
        elif operation == "spill":
            cache.spill(chain[:length])
        elif operation == "evict":
            cache.evict(length)
        else:
            cache.remove(chain[length:])
        assert cache.eviction_order() == cache.model.eviction_order()


def test_leaf_is_evicted_first_and_a_use_makes_pages_recent() -> None:
    order = EvictionOrder()
    one, two = make_chain(NAMESPACE, 3, "one"), make_chain(NAMESPACE, 3, "two")
    entries = add(order, one.keys(), 0) + add(order, two.keys(), 3)
    assert by_rank(order, entries) == [2, 1, 0, 5, 4, 3]
    order.use(one.namespace, one.hashes, [0, 1, 2])
    assert by_rank(order, entries) == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("policy", REUSE_POLICIES, ids=lambda policy: policy.name)
def test_chain_spilled_in_parts_is_evicted_leaf_first(policy: ReusePolicy) -> None:
    """Even if its last part was reused before."""
    order = EvictionOrder(PolicyChooser((policy,)))
    chain = make_chain(NAMESPACE, 6)
    entries = add(order, chain.keys()[:3], 0) + add(order, chain.keys()[3:], 3)
    order.use(chain.namespace, chain.hashes[3:], entries[3:])
    order.adapt(len(entries))
    order.touch(entries)
    assert by_rank(order, entries) == entries[::-1]


@pytest.mark.parametrize("policy", REUSE_POLICIES, ids=lambda policy: policy.name)
def test_more_reuses_never_lower_the_bonus(policy: ReusePolicy) -> None:
    bonuses = policy.bonuses(1000)
    assert len(bonuses) == MOST_USES + 1
    assert bonuses == sorted(bonuses)


class ImmediateOrder(EvictionOrder):
    """Applies every use at once instead of queuing it."""

    def _enqueue(self, *use: Any) -> int:
        first = super()._enqueue(*use)
        self.flush()
        return first


@given(st.data())
def test_queuing_uses_changes_no_decision(data: st.DataObject) -> None:
    queuing, immediate = orders = EvictionOrder(), ImmediateOrder()
    chain = make_chain(NAMESPACE, 12)
    entries: list[int] = []  # entries of the chain's stored pages, which are a prefix
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
                pages = zip(chain.keys()[keep:], entries[keep:], strict=False)
                order.remember_evicted(list(pages))
            del entries[keep:]  # the next spill may use these entries again
    assert [queuing.tick(e) for e in entries] == [immediate.tick(e) for e in entries]
    assert [queuing.rank(e) for e in entries] == [immediate.rank(e) for e in entries]
    assert queuing.reserve_ticks(1) == immediate.reserve_ticks(1)


def test_queue_of_uses_is_bounded() -> None:
    order, chain = EvictionOrder(), make_chain(NAMESPACE, 4096)
    entries = add(order, chain.keys(), 0)
    for _ in range(20):
        order.use(chain.namespace, chain.hashes, entries)
    assert sum(len(use.entries) for use in order._queue) <= 1 << 16
    assert by_rank(order, entries) == entries[::-1]
    assert not order.needs_flush


def test_reuse_count_stops_at_its_maximum() -> None:
    order = EvictionOrder()
    chain = make_chain(NAMESPACE, 2)
    entries = add(order, chain.keys(), 0)
    for _ in range(MOST_USES + 50):
        order.use(chain.namespace, chain.hashes, entries)
    assert by_rank(order, entries) == [1, 0]


def test_storing_an_evicted_page_again_counts_as_reuse_of_its_ancestors_too() -> None:
    order = EvictionOrder()
    keys = make_chain(NAMESPACE, 3).keys()
    entries = add(order, keys, 0)
    order.adapt(8)
    order.remember_evicted([(keys[2], entries[2])])
    assert list(order._uses) == [0, 0, 0]
    stored = add(order, keys, 3)
    assert [order._uses[entry] for entry in stored] == [1, 1, 1]


def test_ghost_list_remembers_about_as_many_pages_as_its_capacity() -> None:
    ghost_list = GhostList(800)
    rng = random.Random(1)
    fingerprints = [rng.getrandbits(64) for _ in range(400)]
    for uses, fingerprint in enumerate(fingerprints):
        ghost_list.add(fingerprint, uses % 200)
    remembered = [ghost_list.pop(fingerprint) for fingerprint in fingerprints]
    assert sum(found is not None for found in remembered) > 380
    assert all(found in (None, uses % 200) for uses, found in enumerate(remembered))
    assert [ghost_list.pop(fingerprint) for fingerprint in fingerprints] == [None] * 400


def test_shadow_chooses_the_policy_with_more_hits() -> None:
    shadow = Shadow()
    shadow.resize(100)
    assert shadow.choose().name == "recency"
    popular, passing = list(range(60)), iter(range(1000, 10**9))
    for _ in range(40):
        shadow.use(popular)
        shadow.use(next(passing) for _ in range(90))
    assert shadow.choose().name != "recency"


def test_sample_stays_small() -> None:
    shadow = Shadow()
    shadow.use(range(20 * SAMPLE_PAGES))
    shadow.resize(100 * SAMPLE_PAGES)
    assert shadow.mask == 127
    assert all(len(cache._ranks) <= SAMPLE_PAGES for cache in shadow.caches)
