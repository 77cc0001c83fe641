"""Clearing a namespace while calls on it are in flight."""

import threading
from collections.abc import Callable

import pytest

from memkv_sglang.engine import engine as engine_module
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.results import PageLoad, Removal
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.memory import MemoryTier
from tests.engine.engines import (
    LENGTHS,
    LOCAL,
    SHARED,
    GatedTier,
    Open,
    load,
    load_any,
    loaded_from,
    put,
    spill,
    wait_until,
)

NAMESPACE = make_namespace(page_bytes=sum(LENGTHS))
DIGEST = NAMESPACE.digest
KEYS = make_chain(NAMESPACE, 3).keys()


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def is_closed(engine: Engine) -> bool:
    return DIGEST in engine._gate._closed


def clear_meanwhile(engine: Engine, gated: GatedTier, call: Callable[[], object] | None) -> Removal:
    """Clear once `call` has reached the gated tier, and let the call continue when `clear` waits
    for it.
    """
    other, _ = in_background(call) if call else (None, None)
    gated.arrived.acquire()
    clearing, results = in_background(lambda: engine.clear(DIGEST))
    wait_until(lambda: is_closed(engine))
    assert clearing.is_alive()
    gated.gate.set()
    clearing.join()
    if other is not None:
        other.join()
    assert isinstance(results[0], Removal)
    return results[0]


def assert_empty(engine: Engine, *tiers: MemoryTier) -> None:
    assert engine.flush(60)
    for tier in tiers:
        assert tier.present(KEYS, 0) == [False] * 3
    assert engine.lookup(make_chain(NAMESPACE, 3)) == (0, True)


def test_clear_waits_for_the_upload_in_flight(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(shared)
    engine = open_engine(local, gated)
    spill(engine, KEYS)
    assert clear_meanwhile(engine, gated, None) == Removal(6, complete=True)
    assert_empty(engine, local, shared)
    assert spill(engine, KEYS) == [SpillResult.STORED] * 3
    assert engine.flush(60)
    assert shared.present(KEYS, 0) == [True] * 3


def test_clear_cancels_only_queued_uploads_of_its_namespace(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(shared)
    engine = open_engine(local, gated)
    others = [make_chain(make_namespace(model=f"other {i}"), 2).keys() for i in range(3)]
    for keys in others[:2]:  # keep both uploaders busy
        spill(engine, keys)
        gated.arrived.acquire()
    spill(engine, KEYS)
    spill(engine, others[2])
    assert engine.status().queue_pages == 9
    assert engine.clear(DIGEST) == Removal(3, complete=True)
    assert engine.status().queue_pages == 6
    gated.gate.set()
    assert_empty(engine, local, shared)
    for keys in others:
        assert shared.present(keys, 0) == [True] * 2


def test_description_is_rewritten_with_the_next_pages(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared)
    engine.describe(NAMESPACE)
    wait_until(lambda: DIGEST in shared.namespaces())
    for _ in range(2):
        spill(engine, KEYS)
        assert engine.flush(60)
        assert engine.clear(DIGEST).complete
        assert shared.namespaces() == {}
        spill(engine, KEYS)
        wait_until(lambda: DIGEST in shared.namespaces())


def test_clear_waits_for_the_spill_in_flight(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(local)
    engine = open_engine(gated, shared, local)
    assert clear_meanwhile(engine, gated, lambda: spill(engine, KEYS)).complete
    assert_empty(engine, local, shared)


def test_clear_waits_for_a_spill_that_bypasses_the_disk(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    gated = GatedTier(shared)
    engine = open_engine(None, gated)
    assert clear_meanwhile(engine, gated, lambda: spill(engine, KEYS)) == Removal(3, complete=True)
    assert_empty(engine, shared)


def test_load_in_flight_promotes_nothing_afterwards(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    put(shared, KEYS)
    gated = GatedTier(shared)
    engine = open_engine(local, gated, promote="always")
    assert clear_meanwhile(engine, gated, lambda: load(engine, KEYS)).complete
    assert_empty(engine, local, shared)


def test_clear_waits_for_the_promotion_in_flight_and_cancels_the_next(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    put(shared, KEYS)
    gated = GatedTier(local)
    gated.gate.set()
    engine = open_engine(gated, shared, local, promote="always")
    gated.gate.clear()
    load(engine, KEYS[:1])
    load(engine, KEYS[1:])  # waits until the first promotion is done
    assert clear_meanwhile(engine, gated, None) == Removal(4, complete=True)
    assert_empty(engine, local, shared)


def test_clear_waits_for_warming_in_flight(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    put(shared, KEYS)
    shared.describe(NAMESPACE)
    gated = GatedTier(shared)
    engine = open_engine(local, gated)
    assert clear_meanwhile(engine, gated, lambda: engine.warm(KEYS)) == Removal(6, complete=True)
    assert_empty(engine, local, shared)


class ClearingTier(MemoryTier):
    """Calls a function in the middle of a clear."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.meanwhile: Callable[[], None] = lambda: None

    def clear(self, namespace: bytes) -> int:
        removed = super().clear(namespace)
        self.meanwhile()
        return removed


def test_nothing_is_found_or_stored_during_a_clear(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), ClearingTier(SHARED)
    engine = open_engine(local, shared)
    spill(engine, KEYS)
    assert engine.flush(60)
    other = make_chain(make_namespace(model="another"), 3).keys()
    asked: list[bool] = []

    def ask() -> None:
        asked.append(True)
        assert spill(engine, KEYS) == [SpillResult.REFUSED] * 3
        skipped = [PageLoad(LoadResult.SKIPPED)] * 2
        assert load_any(engine, KEYS) == [PageLoad(LoadResult.MISSING), *skipped]
        assert engine.lookup(make_chain(NAMESPACE, 3)) == (0, True)
        assert engine.present(KEYS) == [False] * 3
        with pytest.raises(TierError, match="being cleared"):
            shared.describe(NAMESPACE)
            engine.warm(KEYS)
        spill(engine, other)
        assert load(engine, other) == loaded_from(LOCAL, 3)

    shared.meanwhile = ask
    assert engine.clear(DIGEST).complete
    assert asked
    assert_empty(engine, local, shared)


def test_pages_stored_late_by_a_server_are_removed_too(open_engine: Open) -> None:
    """The tier may execute a request although its caller has stopped waiting."""
    shared = ClearingTier(SHARED)
    engine = open_engine(None, shared)
    late = iter([KEYS[:1], KEYS[1:2]])
    spill(engine, KEYS)
    shared.meanwhile = lambda: put(shared, next(late, []))
    assert engine.clear(DIGEST) == Removal(5, complete=True)
    assert_empty(engine, shared)


def test_hanging_call_makes_the_clear_incomplete(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CLEAR_WAIT", 0.05)
    shared = MemoryTier(name=SHARED)
    gated = GatedTier(shared)
    engine = open_engine(None, gated)
    thread, _ = in_background(lambda: spill(engine, KEYS))
    gated.arrived.acquire()
    assert engine.clear(DIGEST) == Removal(0, complete=False)
    gated.gate.set()
    thread.join()
    assert engine.clear(DIGEST) == Removal(3, complete=True)


def test_clears_of_one_namespace_may_overlap(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    gated = GatedTier(shared)
    engine = open_engine(None, gated)
    thread, _ = in_background(lambda: spill(engine, KEYS))
    gated.arrived.acquire()
    clearings = [in_background(lambda: engine.clear(DIGEST)) for _ in range(2)]
    wait_until(lambda: engine._gate._closed[DIGEST] == 2)
    gated.gate.set()
    for clearing, results in clearings:
        clearing.join()
        assert isinstance(results[0], Removal)
        assert results[0].complete
    thread.join()
    assert_empty(engine, shared)
    assert not is_closed(engine)
    assert spill(engine, KEYS) == [SpillResult.STORED] * 3
