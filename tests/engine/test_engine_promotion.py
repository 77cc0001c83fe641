"""Promotion: which pages of the shared tier are copied to the disk."""

from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.page import Page
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import SpillResult
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


def test_promotion_over_its_memory_limit_is_skipped(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    keys = make_chain(NAMESPACE, 5).keys()
    put(shared, keys)
    registry = CollectorRegistry()
    engine = open_engine(local, shared, registry=registry, promote="always", promote_buffer=16384)
    load(engine, keys)
    assert engine.flush(timeout=60)
    assert sum(local.present(keys, 0)) == 2
    assert registry.get_sample_value("memkv_promotion_pages_total", {"result": "no_space"}) == 3


class DefectiveTier(MemoryTier):
    """Raises an unexpected exception once."""

    shown = False

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        if not self.shown:
            self.shown = True
            raise RuntimeError("a defect")
        return super().spill(pages, deadline)


def test_promotion_continues_after_an_unexpected_error(open_engine: Open) -> None:
    local, shared = DefectiveTier(name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared, promote="always")
    for seed in ("one", "two"):
        keys = make_chain(NAMESPACE, 3, seed).keys()
        put(shared, keys)
        load(engine, keys)
        assert engine.flush(timeout=60)
        assert local.present(keys, 0) == [seed == "two"] * 3
