"""Checksums travel with pages, so a client that changes its memory corrupts no copy."""

import threading
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import Fetched, LoadResult, SpillResult, Tier
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import WrapperTier
from tests.engine.engines import (
    LENGTHS,
    LOCAL,
    SHARED,
    GatedTier,
    Open,
    load,
    loaded_from,
    put,
    spill,
    wait_until,
)

NAMESPACE = make_namespace(page_bytes=sum(LENGTHS))


class OverwrittenTier(WrapperTier):
    """During its first load a client writes to the pages right after they were verified."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.overwrites = True

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        outcomes = super().fetch(pages, deadline)
        if self.overwrites:
            self.overwrites = False
            pages[0].buffers[-1][-1] ^= 1
        return outcomes


class KeepingTier(MemoryTier):
    """Records the checksums of the pages that it receives."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.given: list[bytes | None] = []

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.given += [page.checksum for page in pages]
        return super().spill(pages, deadline)


def load_unseen(engine: Engine, keys: Sequence[PageKey]) -> list[PageLoad]:
    return engine.load([make_page(key, LENGTHS, filled=False) for key in keys])


def test_overwritten_page_is_not_promoted(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 3).keys()
    put(shared, keys)
    registry = CollectorRegistry()
    engine = open_engine(local, OverwrittenTier(shared), registry=registry, promote="always")
    load_unseen(engine, keys)
    assert engine.flush(60)
    assert local.present(keys, 0) == [False, True, True]
    counted = registry.get_sample_value
    assert counted("memkv_promotion_pages_total", {"result": "changed"}) == 1
    assert counted("memkv_promotion_pages_total", {"result": "stored"}) == 2
    assert counted("memkv_changed_pages_total", {"copied_for": "promotion"}) == 1
    load(engine, keys)  # a load compares pages with their checksums
    assert engine.flush(60)
    assert local.present(keys, 0) == [True] * 3


@pytest.mark.parametrize("lengths", [LENGTHS, (sum(LENGTHS),)], ids=str)
def test_follower_of_an_overwritten_page_loads_it_itself(
    open_engine: Open, waiting_pages: list[PageKey], lengths: tuple[int, ...]
) -> None:
    shared = MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 3).keys()
    put(shared, keys)
    gated = GatedTier(OverwrittenTier(shared))
    registry = CollectorRegistry()
    engine = open_engine(None, gated, registry=registry)
    leader = threading.Thread(target=lambda: load_unseen(engine, keys))
    leader.start()
    gated.arrived.acquire()
    pages = [make_page(key, lengths, filled=False) for key in keys]
    answers: list[list[PageLoad]] = []
    follower = threading.Thread(target=lambda: answers.append(engine.load(pages)))
    follower.start()
    wait_until(lambda: waiting_pages == keys)
    gated.gate.set()
    leader.join()
    follower.join()
    assert answers == [loaded_from(SHARED, 3)]
    assert all(map(holds_content, pages))
    assert registry.get_sample_value("memkv_merged_pages_total") == 2
    counted = registry.get_sample_value("memkv_changed_pages_total", {"copied_for": "equal_load"})
    assert counted == 1


class SpoiledTier(WrapperTier):
    """Its first load fails, as if a client wrote to the pages while they were verified."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.spoils = True

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        if self.spoils:
            self.spoils = False
            return [Fetched(LoadResult.FAILED)] * len(pages)
        return super().fetch(pages, deadline)


def test_follower_of_a_corrupted_load_loads_the_pages_itself(
    open_engine: Open, waiting_pages: list[PageKey]
) -> None:
    local = MemoryTier(name=LOCAL)
    keys = make_chain(NAMESPACE, 3).keys()
    put(local, keys)
    gated = GatedTier(SpoiledTier(local))
    engine = open_engine(gated, None, local)
    leader = threading.Thread(target=lambda: load_unseen(engine, keys))
    leader.start()
    gated.arrived.acquire()
    answers: list[list[PageLoad]] = []
    follower = threading.Thread(target=lambda: answers.append(load(engine, keys)))
    follower.start()
    wait_until(lambda: waiting_pages == keys)
    gated.gate.set()
    leader.join()
    follower.join()
    assert answers == [loaded_from(LOCAL, 3)]


def test_uploads_warming_and_promotion_pass_the_checksum_on(open_engine: Open) -> None:
    local, shared = KeepingTier(LOCAL), KeepingTier(SHARED)
    keys = make_chain(NAMESPACE, 4).keys()
    engine = open_engine(local, shared, promote="always")
    engine.describe(NAMESPACE)
    spill(engine, keys)
    assert engine.flush(60)
    checksums = [shared._pages[key].checksum for key in keys]
    assert local.given == [None] * 4  # pages from a client have no checksum yet
    assert shared.given == checksums
    local.remove(keys)
    local.given.clear()
    wait_until(lambda: NAMESPACE.digest in shared.namespaces())
    assert engine.warm(keys).copied == 4
    assert local.given == checksums
    local.remove(keys)
    local.given.clear()
    load(engine, keys)
    assert engine.flush(60)
    assert local.given == checksums
