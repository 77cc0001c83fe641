"""What callers of the engine rely on, over two memory tiers that fail and stall on demand."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.metrics import Metrics
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.testing.pages import (
    holds_content,
    make_chain,
    make_hashes,
    make_namespace,
    make_page,
)
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult, Tier, TierError
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import CountingTier, FaultyTier, WrapperTier

LENGTHS = (4096, 4096)
NAMESPACE = make_namespace()
LOCAL, SHARED = "local", "shared"

Open = Callable[..., Engine]


@pytest.fixture
def open_engine() -> Iterator[Open]:
    """Give a function that makes engines; closes them in the end."""
    engines: list[Engine] = []

    def make(
        local: Tier | None = None,
        shared: Tier | None = None,
        marks: MemoryTier | None = None,
        registry: CollectorRegistry | None = None,
        **settings: object,
    ) -> Engine:
        config = EngineConfig(**settings)  # type: ignore[arg-type]  # names are spelt in the tests
        metrics = Metrics(registry or CollectorRegistry())
        if marks is None and isinstance(local, MemoryTier):
            marks = local
        engines.append(Engine(local, shared, marks, config, metrics))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(drain=0)


def spill(engine: Engine, keys: Sequence[PageKey], parent: bytes = b"") -> list[SpillResult]:
    return engine.spill([make_page(key, LENGTHS, filled=True) for key in keys], parent)


def load(engine: Engine, keys: Sequence[PageKey]) -> list[PageLoad]:
    pages = [make_page(key, LENGTHS, filled=False) for key in keys]
    loads = engine.load(pages)
    for page, one in zip(pages, loads, strict=True):
        assert holds_content(page) == (one.result is LoadResult.LOADED)
    return loads


def put(tier: Tier, keys: Sequence[PageKey]) -> None:
    tier.spill([make_page(key, LENGTHS, filled=True) for key in keys], time.monotonic() + 60)


def loaded_from(tier: str, count: int) -> list[PageLoad]:
    return [PageLoad(LoadResult.LOADED, tier)] * count


def test_what_one_node_spilled_the_other_loads(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    one = open_engine(MemoryTier(name=LOCAL), shared)
    other = open_engine(MemoryTier(name=LOCAL), shared)
    chain = make_chain(NAMESPACE, 20)
    assert spill(one, chain.keys()) == [SpillResult.STORED] * 20
    assert one.flush(timeout=60)
    assert other.lookup(chain) == Lookup(20, complete=True)
    assert load(other, chain.keys()) == loaded_from(SHARED, 20)
    assert load(one, chain.keys()) == loaded_from(LOCAL, 20)


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
    """The disk evicted the middle, and the end still waits for its upload."""
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


def test_page_lost_on_disk_comes_from_the_shared_tier(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 9).keys()
    put(local, keys)
    put(shared, keys)
    local._copies[keys[4]].content = bytes(8192)
    loads = load(open_engine(local, shared), keys)
    assert loads[:4] == loaded_from(LOCAL, 4)
    assert loads[4] == PageLoad(LoadResult.LOADED, SHARED)
    assert all(one.result is LoadResult.LOADED for one in loads)


def test_first_miss_ends_the_prefix(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    keys = make_chain(NAMESPACE, 8).keys()
    put(local, keys[:3] + keys[4:])
    loads = load_any(open_engine(local), keys)
    assert loads[:3] == loaded_from(LOCAL, 3)
    assert loads[3].result is LoadResult.MISSING
    assert {one.result for one in loads[4:]} == {LoadResult.SKIPPED}


def load_any(engine: Engine, keys: Sequence[PageKey]) -> list[PageLoad]:
    """Load without a look at the buffers of pages that are not loaded."""
    return engine.load([make_page(key, LENGTHS, filled=False) for key in keys])


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


def test_without_any_tier_everything_is_a_miss(open_engine: Open) -> None:
    engine = open_engine()
    chain = make_chain(NAMESPACE, 3)
    assert spill(engine, chain.keys()) == [SpillResult.REFUSED] * 3
    assert engine.lookup(chain) == Lookup(0, complete=True)
    assert load(engine, chain.keys())[0].result is LoadResult.MISSING
    assert engine.flush(timeout=1)


class GatedTier(WrapperTier):
    """Holds loads and spills until the gate opens; tells when one has arrived."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.arrived = threading.Semaphore(0)

    def load(self, pages: Sequence[Page], deadline: float) -> list[LoadResult]:
        self.arrived.release()
        self.gate.wait(60)
        return super().load(pages, time.monotonic() + 60)  # late, as a disk may be

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.arrived.release()
        self.gate.wait(60)
        return super().spill(pages, deadline)


def test_equal_loads_in_flight_are_fetched_once(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 5).keys()
    put(inner, keys)
    counting = CountingTier(inner)
    gated = GatedTier(counting)
    registry = CollectorRegistry()
    engine = open_engine(None, gated, registry=registry)
    answers: list[list[PageLoad]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(load(engine, keys))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    gated.arrived.acquire()
    wait_until(lambda: flights(engine, keys[0]) == 5)
    gated.gate.set()
    for thread in threads:
        thread.join()
    assert answers == [loaded_from(SHARED, 5)] * 6
    assert counting.loads[LoadResult.LOADED] == 5
    assert registry.get_sample_value("memkv_merged_pages_total") == 25


def flights(engine: Engine, key: PageKey) -> int:
    return len(engine._loader._flights._flights.get(key, []))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "condition never came true"
        time.sleep(0.005)


def test_follower_leaves_at_its_deadline_and_its_buffers_stay_its_own(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 2).keys()
    put(inner, keys)
    gated = GatedTier(inner)
    engine = open_engine(None, gated, batch_deadline=0.2)
    leader = threading.Thread(target=lambda: load_any(engine, keys))
    leader.start()
    gated.arrived.acquire()
    pages = [make_page(key, LENGTHS, filled=False) for key in keys]
    results = [one.result for one in engine.load(pages)]
    assert results == [LoadResult.FAILED, LoadResult.SKIPPED]
    for page in pages:
        for buffer in page.buffers:
            buffer[:] = bytes(len(buffer))
    gated.gate.set()
    leader.join()
    assert not any(any(b"".join(page.buffers)) for page in pages)


def test_page_asked_for_twice_in_one_load(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    keys = make_chain(NAMESPACE, 2).keys()
    put(local, keys)
    assert load(open_engine(local), [keys[0], keys[0], keys[1]]) == loaded_from(LOCAL, 3)


def test_uploads_go_on_after_a_restart(open_engine: Open) -> None:
    """What was acknowledged reaches the shared tier though the first process was killed."""
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
    engine = open_engine(MemoryTier(name=LOCAL), shared, breaker_open=0.01, upload_attempts=3)
    chain = make_chain(NAMESPACE, 30)
    spill(engine, chain.keys())
    wait_until(lambda: engine.status().breaker != "closed")
    assert engine.status().queue_pages == 30
    assert engine.lookup(chain).length == 30
    down.clear()
    assert engine.flush(timeout=60)
    assert inner.lookup(chain, 0).length == 30
    assert engine.status().queue_pages == engine.status().queue_bytes == 0


def test_page_that_can_never_be_uploaded_is_dropped_and_counted(open_engine: Open) -> None:
    keys = make_chain(NAMESPACE, 3).keys()
    shared = FaultyTier(MemoryTier(name=SHARED), lambda verb, key: key == keys[2])
    registry = CollectorRegistry()
    engine = open_engine(
        MemoryTier(name=LOCAL), shared, registry=registry, upload_attempts=2, breaker_failures=99
    )
    spill(engine, keys)
    assert engine.flush(timeout=60)
    dropped = registry.get_sample_value("memkv_uploads_dropped_pages_total", {"reason": "failed"})
    assert dropped == 1
    assert load(engine, keys) == loaded_from(LOCAL, 3)


def test_full_backlog_keeps_whole_chains_local(open_engine: Open) -> None:
    """No upload may leave a hole: what follows a dropped page is dropped too."""
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    registry = CollectorRegistry()
    engine = open_engine(local, gated, registry=registry, upload_backlog=4 * 8192)
    hashes = make_hashes(12)
    keys = Chain(NAMESPACE.digest, hashes).keys()
    assert spill(engine, keys[:4]) == [SpillResult.STORED] * 4
    assert spill(engine, keys[4:8], hashes[3]) == [SpillResult.STORED] * 4
    gated.gate.set()
    assert engine.flush(timeout=60)
    spill(engine, keys[8:], hashes[7])
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [True] * 4 + [False] * 8
    dropped = registry.get_sample_value("memkv_uploads_dropped_pages_total", {"reason": "backlog"})
    assert dropped == 8
    assert load(engine, keys) == loaded_from(LOCAL, 12)


def test_dropped_pages_are_uploaded_when_they_are_spilled_again(open_engine: Open) -> None:
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    engine = open_engine(local, gated, upload_backlog=4 * 8192)
    keys = make_chain(NAMESPACE, 6).keys()
    spill(engine, make_chain(NAMESPACE, 3, "first in line").keys())
    spill(engine, keys[:2])
    gated.gate.set()
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [False] * 6
    assert spill(engine, keys[:4])[:2] == [SpillResult.PRESENT] * 2
    assert engine.flush(timeout=60)
    assert inner.present(keys, 0) == [True] * 4 + [False] * 2


def test_no_branch_is_uploaded_behind_a_dropped_page(open_engine: Open) -> None:
    local, inner = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    gated = GatedTier(inner)
    engine = open_engine(local, gated, upload_backlog=3 * 8192)
    hashes = make_hashes(6)
    spill(engine, make_chain(NAMESPACE, 3, "first in line").keys())
    spill(engine, Chain(NAMESPACE.digest, hashes).keys())
    gated.gate.set()
    assert engine.flush(timeout=60)
    branch = Chain(NAMESPACE.digest, make_hashes(2, "branch", hashes[2])).keys()
    spill(engine, branch, parent=hashes[2])
    assert engine.flush(timeout=60)
    assert inner.present(branch, 0) == [False, False]


class BrokenTier(WrapperTier):
    """Has a bug that shows `times` times."""

    times = 3

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.times -= 1
        if self.times >= 0:
            raise RuntimeError("a bug")
        return super().spill(pages, deadline)


def test_uploads_go_on_after_an_unexpected_error(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), BrokenTier(inner))
    chain = make_chain(NAMESPACE, 3)
    spill(engine, chain.keys())
    assert engine.flush(timeout=60)
    assert inner.lookup(chain, 0).length == 3


def test_close_wakes_who_waits_for_the_queue(open_engine: Open) -> None:
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


def test_follower_fetches_what_its_leader_skipped(open_engine: Open) -> None:
    """The leader's chain has a hole before the page; the follower's has not."""
    inner = MemoryTier(name=SHARED)
    hole, wanted = make_chain(NAMESPACE, 2).keys()
    put(inner, [wanted])
    gated = GatedTier(SkippingTier(inner))
    engine = open_engine(None, gated)
    leader = threading.Thread(target=lambda: load_any(engine, [hole, wanted]))
    leader.start()
    gated.arrived.acquire()
    answers: list[list[PageLoad]] = []
    follower = threading.Thread(target=lambda: answers.append(load(engine, [wanted])))
    follower.start()
    wait_until(lambda: flights(engine, wanted) == 1)
    gated.gate.set()
    leader.join()
    follower.join()
    assert answers == [loaded_from(SHARED, 1)]


class SkippingTier(WrapperTier):
    """Tries no page behind one that is missing, as a tier may."""

    def load(self, pages: Sequence[Page], deadline: float) -> list[LoadResult]:
        results = super().load(pages, deadline)
        misses = (i for i, result in enumerate(results) if result is not LoadResult.LOADED)
        end = next(misses, len(pages)) + 1
        return results[:end] + [LoadResult.SKIPPED] * len(results[end:])


def test_description_waits_for_the_shared_tier(
    open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.engine.describer.RETRY_SECONDS", 0.01)
    inner = MemoryTier(name=SHARED)
    shared = ForgetfulTier(inner)
    open_engine(MemoryTier(name=LOCAL), shared).describe(NAMESPACE)
    wait_until(lambda: shared.refused.is_set())
    assert inner.namespaces() == {}
    shared.takes.set()
    wait_until(lambda: NAMESPACE.digest in inner.namespaces())


class ForgetfulTier(WrapperTier):
    """Takes no description until it is told to."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.takes = threading.Event()
        self.refused = threading.Event()

    def describe(self, namespace: Namespace) -> None:
        if not self.takes.is_set():
            self.refused.set()
            raise TierError("not now")
        super().describe(namespace)


def test_what_the_shared_tier_has_is_not_sent_again(open_engine: Open) -> None:
    inner = MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 10).keys()
    put(inner, keys[:6])
    shared = CountingTier(inner)
    engine = open_engine(MemoryTier(name=LOCAL), shared)
    spill(engine, keys)
    assert engine.flush(timeout=60)
    assert shared.spills == {SpillResult.STORED: 4}


@pytest.mark.parametrize(("rule", "uses"), [("always", 1), ("second_use", 2), ("never", None)])
def test_promotion_follows_its_rule(open_engine: Open, rule: str, uses: int | None) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 5).keys()
    put(shared, keys)
    engine = open_engine(local, shared, promote=rule)
    for use in (1, 2, 3):
        expected = LOCAL if uses is not None and use > uses else SHARED
        assert load(engine, keys) == loaded_from(expected, 5)
        assert engine.flush(timeout=60)
    assert list(local.pending()) == []


def test_promotion_beyond_its_memory_is_skipped(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 5).keys()
    put(shared, keys)
    registry = CollectorRegistry()
    engine = open_engine(local, shared, registry=registry, promote="always", promote_buffer=16384)
    load(engine, keys)
    assert engine.flush(timeout=60)
    assert sum(local.present(keys, 0)) == 2
    assert registry.get_sample_value("memkv_promoted_pages_total", {"result": "no_room"}) == 3


def test_lookup_of_an_unreachable_tier_is_a_lower_bound(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    chain = make_chain(NAMESPACE, 6)
    put(local, chain.keys()[:4])
    shared = FaultyTier(MemoryTier(name=SHARED), lambda verb, key: True)
    engine = open_engine(local, shared)
    assert engine.lookup(chain) == Lookup(4, complete=False)


def test_clear_takes_both_tiers(open_engine: Open) -> None:
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


def test_close_stops_with_uploads_left(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    engine = open_engine(local, FaultyTier(MemoryTier(name=SHARED), lambda verb, key: True))
    keys = make_chain(NAMESPACE, 3).keys()
    spill(engine, keys)
    engine.close(drain=0.05)
    assert [page.key for page in local.pending()] == keys
    engine.close(drain=0)


def test_page_that_must_be_used_again_is_in_the_shared_tier_when_acknowledged(
    open_engine: Open,
) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared, admission="second_use")
    keys = make_chain(NAMESPACE, 6).keys()
    assert spill(engine, keys) == [SpillResult.STORED] * 6
    assert shared.present(keys, 0) == [True] * 6
    assert local.present(keys, 0) == [False] * 6
    assert load(engine, keys[:4]) == loaded_from(SHARED, 4)
    assert engine.flush(timeout=60)
    assert local.present(keys, 0) == [True] * 4 + [False] * 2
    assert load(engine, keys) == loaded_from(LOCAL, 4) + loaded_from(SHARED, 2)


def test_page_that_the_shared_tier_does_not_take_is_kept_here_whatever_the_rule(
    open_engine: Open,
) -> None:
    local, down = MemoryTier(name=LOCAL), threading.Event()
    keys = make_chain(NAMESPACE, 6).keys()
    shared = FaultyTier(
        MemoryTier(name=SHARED), lambda verb, key: down.is_set() and key in keys[:3]
    )
    engine = open_engine(local, shared, admission="second_use", upload_attempts=1000)
    down.set()
    assert spill(engine, keys[:3]) == [SpillResult.STORED] * 3
    # Their parent waits for upload: past it, the shared tier would hold a chain with a hole.
    assert spill(engine, keys[3:], keys[2].hash) == [SpillResult.STORED] * 3
    assert local.present(keys, 0) == [True] * 6
    down.clear()
    assert engine.flush(timeout=60)
    assert shared.present(keys, 0) == [True] * 6


def test_node_without_shared_tier_keeps_every_page_whatever_the_rule(open_engine: Open) -> None:
    engine = open_engine(MemoryTier(name=LOCAL), admission="second_use")
    keys = make_chain(NAMESPACE, 4).keys()
    assert spill(engine, keys) == [SpillResult.STORED] * 4
    assert load(engine, keys) == loaded_from(LOCAL, 4)
