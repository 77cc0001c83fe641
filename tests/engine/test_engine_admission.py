"""Admission: which spilled pages are written to the disk."""

import threading

from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import FaultyTier
from tests.engine.engines import LOCAL, NAMESPACE, SHARED, Open, load, loaded_from, spill


def test_second_use_admission_acknowledges_once_the_shared_tier_has_the_page(
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


def test_page_refused_by_the_shared_tier_is_stored_locally_under_any_rule(
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
    # Their parent waits for upload; without it, the shared tier would hold a chain with a hole.
    assert spill(engine, keys[3:], [key.hash for key in keys[:3]]) == [SpillResult.STORED] * 3
    assert local.present(keys, 0) == [True] * 6
    down.clear()
    assert engine.flush(timeout=60)
    assert shared.present(keys, 0) == [True] * 6


def test_node_without_shared_tier_stores_every_page_under_any_rule(open_engine: Open) -> None:
    engine = open_engine(MemoryTier(name=LOCAL), admission="second_use")
    keys = make_chain(NAMESPACE, 4).keys()
    assert spill(engine, keys) == [SpillResult.STORED] * 4
    assert load(engine, keys) == loaded_from(LOCAL, 4)
