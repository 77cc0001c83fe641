"""Loads: each page from its nearest tier, concurrent loads merged, buffers owned by one."""

import threading
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_page
from memkv_sglang.tiers.base import Fetched, LoadResult
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import CountingTier, WrapperTier
from tests.engine.engines import (
    LENGTHS,
    LOCAL,
    NAMESPACE,
    SHARED,
    GatedTier,
    Open,
    load,
    load_any,
    loaded_from,
    put,
    wait_until,
)


def test_page_lost_on_disk_comes_from_the_shared_tier(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 9).keys()
    put(local, keys)
    put(shared, keys)
    local._pages[keys[4]].content = bytes(8192)
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


def test_concurrent_loads_of_a_page_are_merged(
    open_engine: Open, waiting_pages: list[PageKey]
) -> None:
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
    wait_until(lambda: waiting_pages.count(keys[0]) == 5)
    gated.gate.set()
    for thread in threads:
        thread.join()
    assert answers == [loaded_from(SHARED, 5)] * 6
    assert counting.loads[LoadResult.LOADED] == 5
    assert registry.get_sample_value("memkv_merged_pages_total") == 25


def test_follower_keeps_its_buffers_after_its_deadline(open_engine: Open) -> None:
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


def test_page_twice_in_one_load(open_engine: Open) -> None:
    local = MemoryTier(name=LOCAL)
    keys = make_chain(NAMESPACE, 2).keys()
    put(local, keys)
    assert load(open_engine(local), [keys[0], keys[0], keys[1]]) == loaded_from(LOCAL, 3)


def test_follower_loads_what_its_leader_skipped(
    open_engine: Open, waiting_pages: list[PageKey]
) -> None:
    """The leader's chain has a hole before the page; the follower's chain does not."""
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
    wait_until(lambda: waiting_pages == [wanted])
    gated.gate.set()
    leader.join()
    follower.join()
    assert answers == [loaded_from(SHARED, 1)]


class SkippingTier(WrapperTier):
    """Stops at the first missing page, as a tier may."""

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        outcomes = super().fetch(pages, deadline)
        misses = (i for i, one in enumerate(outcomes) if one.result is not LoadResult.LOADED)
        end = next(misses, len(pages)) + 1
        return outcomes[:end] + [Fetched(LoadResult.SKIPPED)] * len(outcomes[end:])
