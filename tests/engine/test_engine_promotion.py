"""Promotion: which pages of the shared tier are copied to the disk."""

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.memory import MemoryTier
from tests.engine.engines import LOCAL, NAMESPACE, SHARED, Open, load, loaded_from, put


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
