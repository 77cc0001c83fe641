"""Uploads: restarts, outages, no holes in chains, the backlog limit."""

import threading
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.engine import uploads
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_hashes
from memkv_sglang.tiers.base import Lookup, SpillResult
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import CountingTier, FaultyTier, WrapperTier
from tests.engine.engines import (
    LOCAL,
    NAMESPACE,
    SHARED,
    GatedTier,
    Open,
    load,
    loaded_from,
    put,
    spill,
    wait_until,
)


def test_uploads_resume_after_a_restart(open_engine: Open) -> None:
    """Acknowledged pages reach the shared tier although the first process was killed."""
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    chain = make_chain(NAMESPACE, 7)
    killed = open_engine(local, gated)
    spill(killed, chain.keys())
    gated.arrived.acquire()
    assert {page.key for page in local.pending()} == set(chain.keys())
    assert open_engine(local, inner).flush(timeout=60)
    assert inner.lookup(chain, 0).length == 7
    assert list(local.pending()) == []
    gated.gate.set()


def test_uploads_survive_an_outage(open_engine: Open) -> None:
    down = threading.Event()
    down.set()
    inner = MemoryTier(name=SHARED)
    shared = FaultyTier(inner, lambda verb, key: down.is_set())
    registry = CollectorRegistry()
    engine = open_engine(
        MemoryTier(name=LOCAL), shared, registry=registry, breaker_cooldown=0.01, upload_attempts=3
    )

    def age() -> float:
        engine.status()  # updates the gauges
        return registry.get_sample_value("memkv_upload_queue_age_seconds") or 0.0

    chain = make_chain(NAMESPACE, 30)
    spill(engine, chain.keys())
    wait_until(lambda: engine.status().breaker != "closed")
    wait_until(lambda: age() > 0.05)  # grows although the upload is retried
    assert engine.status().queue_pages == 30
    assert engine.lookup(chain).length == 30
    down.clear()
    assert engine.flush(timeout=60)
    assert inner.lookup(chain, 0).length == 30
    assert engine.status().queue_pages == engine.status().queue_bytes == 0
    assert age() == 0.0


class CrowdedTier(MemoryTier):
    """Evicts the third page of a spill for a concurrent spill."""

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        results = super().spill(pages, deadline)
        self.remove([pages[2].key])
        return results


def test_page_evicted_before_it_could_be_marked_is_not_acknowledged(open_engine: Open) -> None:
    chain = make_chain(NAMESPACE, 4)
    shared = FaultyTier(MemoryTier(name=SHARED), lambda verb, key: verb == "spill")
    engine = open_engine(CrowdedTier(name=LOCAL), shared)
    assert spill(engine, chain.keys()) == [SpillResult.STORED] * 2 + [SpillResult.FAILED] * 2
    assert engine.status().queue_pages == 2


def test_page_that_cannot_be_uploaded_is_dropped_and_counted(open_engine: Open) -> None:
    keys = make_chain(NAMESPACE, 3).keys()
    shared = FaultyTier(MemoryTier(name=SHARED), lambda verb, key: key == keys[2])
    registry = CollectorRegistry()
    engine = open_engine(
        MemoryTier(name=LOCAL), shared, registry=registry, upload_attempts=2, breaker_failures=99
    )
    spill(engine, keys)
    assert engine.flush(timeout=60)
    dropped = registry.get_sample_value("memkv_upload_dropped_pages_total", {"reason": "failed"})
    assert dropped == 1
    assert load(engine, keys) == loaded_from(LOCAL, 3)


def test_full_backlog_keeps_whole_chains_local(open_engine: Open) -> None:
    """No upload may leave a hole: the descendants of a dropped page are dropped too."""
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    registry = CollectorRegistry()
    engine = open_engine(local, gated, registry=registry, upload_backlog=4 * 8192)
    hashes = make_hashes(12)
    keys = Chain(NAMESPACE.digest, hashes).keys()
    assert spill(engine, keys[:4]) == [SpillResult.STORED] * 4
    assert spill(engine, keys[4:8], hashes[:4]) == [SpillResult.STORED] * 4
    gated.gate.set()
    assert engine.flush(timeout=60)
    spill(engine, keys[8:], hashes[:8])
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [True] * 4 + [False] * 8
    dropped = registry.get_sample_value("memkv_upload_dropped_pages_total", {"reason": "backlog"})
    assert dropped == 8
    assert load(engine, keys) == loaded_from(LOCAL, 12)


class SlowlyMarking(MemoryTier):
    """Marks pages only when the test allows it."""

    def __init__(self) -> None:
        super().__init__(name=LOCAL)
        self.arrived = threading.Semaphore(0)
        self.gate = threading.Event()

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        self.arrived.release()
        assert self.gate.wait(60)
        return super().mark_pending(keys)


def test_concurrent_calls_respect_the_backlog(open_engine: Open) -> None:
    local, inner = SlowlyMarking(), MemoryTier(name=SHARED)
    engine = open_engine(local, inner, upload_backlog=4 * 8192)
    first, second = make_chain(NAMESPACE, 3, "first"), make_chain(NAMESPACE, 2, "second")
    caller = threading.Thread(target=spill, args=(engine, first.keys()))
    caller.start()
    local.arrived.acquire()
    assert engine.status().queue_bytes == 3 * 8192
    other = threading.Thread(target=spill, args=(engine, second.keys()))
    other.start()
    other.join(60)
    assert not other.is_alive(), "dropped pages are not marked"
    local.gate.set()
    caller.join()
    assert engine.flush(timeout=60)
    assert inner.lookup(first, 0).length == 3
    assert inner.lookup(second, 0).length == 0


def test_disk_full_of_waiting_pages_refuses_more_and_loses_none(open_engine: Open) -> None:
    """During an outage no acknowledged page is evicted; afterwards all are uploaded."""
    down = threading.Event()
    down.set()
    inner = MemoryTier(name=SHARED)
    shared = FaultyTier(inner, lambda verb, key: down.is_set())
    local = MemoryTier(capacity=4 * 8192, name=LOCAL)
    engine = open_engine(local, shared, breaker_cooldown=0.01, upload_attempts=99)
    waiting, more = make_chain(NAMESPACE, 4), make_chain(NAMESPACE, 3, "more")
    assert spill(engine, waiting.keys()) == [SpillResult.STORED] * 4
    assert set(spill(engine, more.keys())).isdisjoint({SpillResult.STORED, SpillResult.PRESENT})
    assert load(engine, waiting.keys()) == loaded_from(LOCAL, 4)
    down.clear()
    assert engine.flush(timeout=60)
    assert inner.lookup(waiting, 0).length == 4
    assert spill(engine, more.keys()) == [SpillResult.STORED] * 3
    assert load(engine, more.keys()) == loaded_from(LOCAL, 3)


def test_dropped_pages_are_uploaded_when_spilled_again(open_engine: Open) -> None:
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    engine = open_engine(local, gated, upload_backlog=4 * 8192)
    keys = make_chain(NAMESPACE, 6).keys()
    spill(engine, make_chain(NAMESPACE, 3, "first in line").keys())
    spill(engine, keys[:2])
    gated.gate.set()
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [False] * 6
    assert spill(engine, keys[:2]) == [SpillResult.PRESENT] * 2
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [True] * 2 + [False] * 4
    spill(engine, keys[2:], before=[key.hash for key in keys[:2]])
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [True] * 6


def test_descendants_of_a_dropped_page_are_not_uploaded(open_engine: Open) -> None:
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    engine = open_engine(local, gated, upload_backlog=3 * 8192)
    hashes = make_hashes(6)
    spill(engine, make_chain(NAMESPACE, 3, "first in line").keys())
    spill(engine, Chain(NAMESPACE.digest, hashes).keys())
    gated.gate.set()
    assert engine.flush(timeout=60)
    branch = Chain(NAMESPACE.digest, make_hashes(2, "branch", hashes[2])).keys()
    spill(engine, branch, before=hashes[:3])
    assert engine.flush(timeout=60)
    assert inner.present(branch, 0) == [False, False]


class BrokenTier(WrapperTier):
    """Raises an unexpected exception `times` times."""

    times = 3

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.times -= 1
        if self.times >= 0:
            raise RuntimeError("a bug")
        return super().spill(pages, deadline)


def test_uploads_continue_after_an_unexpected_error(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), BrokenTier(inner))
    chain = make_chain(NAMESPACE, 3)
    spill(engine, chain.keys())
    assert engine.flush(timeout=60)
    assert inner.lookup(chain, 0).length == 3


def test_pages_in_the_shared_tier_are_not_uploaded_again(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 10).keys()
    put(inner, keys[:6])
    shared = CountingTier(inner)
    engine = open_engine(MemoryTier(name=LOCAL), shared)
    spill(engine, keys)
    assert engine.flush(timeout=60)
    assert shared.spills == {SpillResult.STORED: 4}


def test_close_wakes_waiting_flushes(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    engine = open_engine(local, FaultyTier(MemoryTier(name=SHARED), lambda verb, key: True))
    spill(engine, make_chain(NAMESPACE, 3).keys())
    waits = [threading.Thread(target=engine.flush, args=(3600,)) for _ in range(2)]
    for wait in waits:
        wait.start()
    engine.close(drain=0.05)
    for wait in waits:
        wait.join(30)
        assert not wait.is_alive()


def test_close_stops_with_uploads_left(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    engine = open_engine(local, FaultyTier(MemoryTier(name=SHARED), lambda verb, key: True))
    keys = make_chain(NAMESPACE, 3).keys()
    spill(engine, keys)
    engine.close(drain=0.05)
    assert [page.key for page in local.pending()] == keys
    engine.close(drain=0)


class SteppingTier(WrapperTier):
    """Finds a prefix like a sparse search does: it can step over a missing page."""

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        there = self.inner.present(chain.keys(), deadline)
        return Lookup(len(there) - there[::-1].index(True) if True in there else 0, complete=True)


def test_missing_page_within_a_chain_is_uploaded(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    chain = make_chain(NAMESPACE, 10)
    put(inner, [key for i, key in enumerate(chain.keys()) if i != 4])
    engine = open_engine(MemoryTier(name=LOCAL), SteppingTier(inner))
    spill(engine, chain.keys())
    assert engine.flush(timeout=60)
    assert inner.lookup(chain, 0).length == 10


class FullTier(WrapperTier):
    """Stores nothing for `times` calls."""

    times = 5

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.times -= 1
        if self.times >= 0:
            return [SpillResult.REFUSED] * len(pages)
        return super().spill(pages, deadline)


def test_pages_wait_until_a_full_shared_tier_has_space(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "RETRY_SECONDS", 0.01)
    inner = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), FullTier(inner), upload_attempts=2)
    chain = make_chain(NAMESPACE, 3)
    spill(engine, chain.keys())
    assert engine.flush(timeout=60)
    assert inner.lookup(chain, 0).length == 3


def test_page_stored_again_while_waiting_is_marked_again(open_engine: Open) -> None:
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    shared = FaultyTier(inner, lambda verb, key: True)
    engine = open_engine(local, shared)
    chain = make_chain(NAMESPACE, 5)
    spill(engine, chain.keys())
    local.clear(NAMESPACE.digest)
    spill(engine, chain.keys())
    assert {page.key for page in local.pending()} == set(chain.keys())
    # A new engine, as after a restart, with a shared tier that works.
    assert open_engine(local, inner).flush(timeout=60)
    assert inner.lookup(chain, 0).length == 5
