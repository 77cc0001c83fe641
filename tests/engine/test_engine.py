"""The engine as a whole: sharing between nodes; missing, full and cleared tiers."""

import threading

import pytest

from memkv_sglang.namespace import Namespace
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult, Tier, TierError
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import FaultyTier, WrapperTier
from tests.engine.engines import (
    LOCAL,
    NAMESPACE,
    SHARED,
    Open,
    load,
    loaded_from,
    spill,
    wait_until,
)


def test_nodes_load_each_others_pages(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    one = open_engine(MemoryTier(name=LOCAL), shared)
    other = open_engine(MemoryTier(name=LOCAL), shared)
    chain = make_chain(NAMESPACE, 20)
    assert spill(one, chain.keys()) == [SpillResult.STORED] * 20
    assert one.flush(timeout=60)
    assert other.lookup(chain) == Lookup(20, complete=True)
    assert load(other, chain.keys()) == loaded_from(SHARED, 20)
    assert load(one, chain.keys()) == loaded_from(LOCAL, 20)


def test_without_a_disk_pages_go_straight_to_the_shared_tier(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    engine = open_engine(None, shared)
    chain = make_chain(NAMESPACE, 3)
    assert spill(engine, chain.keys()) == [SpillResult.STORED] * 3
    assert shared.lookup(chain, 0).length == 3


def test_full_disk_sends_pages_to_the_shared_tier(open_engine: Open) -> None:
    keys = make_chain(NAMESPACE, 6).keys()
    local = FaultyTier(MemoryTier(name=LOCAL), lambda verb, key: verb == "spill" and key == keys[2])
    shared = MemoryTier(name=SHARED)
    engine = open_engine(local, shared)
    assert spill(engine, keys) == [SpillResult.STORED] * 6
    assert [one.tier for one in load(engine, keys)] == [LOCAL] * 2 + [SHARED] * 4


def test_without_tiers_everything_is_a_miss(open_engine: Open) -> None:
    engine = open_engine()
    chain = make_chain(NAMESPACE, 3)
    assert spill(engine, chain.keys()) == [SpillResult.REFUSED] * 3
    assert engine.lookup(chain) == Lookup(0, complete=True)
    assert load(engine, chain.keys())[0].result is LoadResult.MISSING
    assert engine.flush(timeout=1)


def test_clear_empties_both_tiers(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared)
    chain = make_chain(NAMESPACE, 4)
    spill(engine, chain.keys())
    assert engine.flush(timeout=60)
    assert engine.clear(NAMESPACE.digest) == (8, True)
    assert engine.lookup(chain).length == 0


def test_descriptions_reach_both_tiers(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared)
    engine.describe(NAMESPACE)
    wait_until(lambda: bool(shared.namespaces()))
    assert local.namespaces() == shared.namespaces() == {NAMESPACE.digest: NAMESPACE}


def test_description_is_retried_until_the_shared_tier_accepts_it(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.engine.namespace_publisher.RETRY_SECONDS", 0.01)
    inner = MemoryTier(name=SHARED)
    shared = ForgetfulTier(inner)
    open_engine(MemoryTier(name=LOCAL), shared).describe(NAMESPACE)
    wait_until(lambda: shared.refused.is_set())
    assert inner.namespaces() == {}
    shared.takes.set()
    wait_until(lambda: NAMESPACE.digest in inner.namespaces())


def test_descriptions_are_rewritten(open_engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memkv_sglang.engine.namespace_publisher.RENEW_INTERVAL", 0.01)
    monkeypatch.setattr("memkv_sglang.engine.namespace_publisher.MAX_PUBLISHED", 2)
    shared = MemoryTier(name=SHARED)
    engine = open_engine(None, shared)
    oldest, *newest = [make_namespace(model=f"model {number}") for number in range(3)]
    for namespace in (newest[0], oldest, *newest):
        engine.describe(namespace)
    for _ in range(3):  # removes the descriptions repeatedly, like a lifecycle rule
        wait_until(lambda: shared.namespaces().keys() >= {each.digest for each in newest})
        for namespace in (oldest, *newest):
            shared.clear(namespace.digest)
    wait_until(lambda: len(shared.namespaces()) == 2)
    assert oldest.digest not in shared.namespaces()


def test_pending_descriptions_are_bounded(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.engine.namespace_publisher.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("memkv_sglang.engine.namespace_publisher.MAX_PUBLISHED", 2)
    inner = MemoryTier(name=SHARED)
    shared = ForgetfulTier(inner)
    engine = open_engine(None, shared)
    namespaces = [make_namespace(model=f"model {number}") for number in range(5)]
    for namespace in namespaces:
        engine.describe(namespace)
    shared.refused.clear()
    wait_until(lambda: shared.refused.is_set())  # after this, no earlier call is still in flight
    shared.takes.set()
    wait_until(lambda: namespaces[-1].digest in inner.namespaces())
    assert inner.namespaces().keys() == {each.digest for each in namespaces[-2:]}


class ForgetfulTier(WrapperTier):
    """Rejects descriptions until the test allows them."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.takes = threading.Event()
        self.refused = threading.Event()

    def describe(self, namespace: Namespace) -> None:
        if not self.takes.is_set():
            self.refused.set()
            raise TierError("not now")
        super().describe(namespace)
