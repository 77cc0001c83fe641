"""`engine.upload`: which pages reach the shared tier, and when."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.load import load_config
from memkv_sglang.page import PageKey
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.memory import MemoryTier
from tests.engine.engines import (
    LENGTHS,
    LOCAL,
    NAMESPACE,
    SHARED,
    Open,
    load,
    load_any,
    loaded_from,
    spill,
)

PAGE = sum(LENGTHS)
KEYS = make_chain(NAMESPACE, 12).keys()


def in_shared(shared: MemoryTier, keys: Sequence[PageKey] = KEYS) -> int:
    """Return the length of the prefix in the shared tier; check that nothing follows a gap."""
    here = shared.present(keys, 0)
    assert sorted(here, reverse=True) == here
    return sum(here)


def hashes(keys: Sequence[PageKey]) -> list[bytes]:
    return [key.hash for key in keys]


def test_always_uploads_at_once(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), shared)
    spill(engine, KEYS)
    assert engine.flush(60)
    assert in_shared(shared) == 12


def test_second_use_uploads_pages_that_are_loaded(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared, upload="second_use")
    spill(engine, KEYS)
    assert engine.flush(60)
    assert in_shared(shared) == 0
    assert load(engine, KEYS[:5]) == loaded_from(LOCAL, 5)
    assert engine.flush(60)
    assert in_shared(shared) == 5
    assert list(local.pending()) == []


def test_second_use_uploads_pages_that_a_conversation_continues(open_engine: Open) -> None:
    """SGLang may still hold these pages and never load them."""
    shared = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), shared, upload="second_use")
    spill(engine, KEYS[:8])
    spill(engine, KEYS[8:], before=hashes(KEYS[:8]))
    assert engine.flush(60)
    assert in_shared(shared) == 8


def test_second_use_uploads_pages_that_are_spilled_again(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), shared, upload="second_use")
    spill(engine, KEYS[:4])
    spill(engine, KEYS)
    assert engine.flush(60)
    assert in_shared(shared) == 4


def test_second_use_continues_a_chain_of_another_node(open_engine: Open) -> None:
    """The first pages are in the shared tier only."""
    shared, local = MemoryTier(name=SHARED), MemoryTier(name=LOCAL)
    other = open_engine(MemoryTier(name=LOCAL), shared)
    spill(other, KEYS[:4])
    assert other.flush(60)
    engine = open_engine(local, shared, upload="second_use", promote="never")
    load_any(engine, KEYS[:4])
    spill(engine, KEYS[4:8], before=hashes(KEYS[:4]))
    spill(engine, KEYS[8:], before=hashes(KEYS[:8]))
    assert engine.flush(60)
    assert in_shared(shared) == 8


def test_second_use_uploads_again_after_a_clear(open_engine: Open) -> None:
    shared = MemoryTier(name=SHARED)
    engine = open_engine(MemoryTier(name=LOCAL), shared, upload="second_use")
    for _ in range(2):
        spill(engine, KEYS)
        load(engine, KEYS)
        assert engine.flush(60)
        assert in_shared(shared) == 12
        engine.clear(NAMESPACE.digest)
        assert in_shared(shared) == 0


def test_before_eviction_uploads_the_oldest_half_of_a_full_disk(open_engine: Open) -> None:
    local, shared = MemoryTier(12 * PAGE, name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared, upload="before_eviction")
    for i in range(12):
        spill(engine, KEYS[i : i + 1], before=hashes(KEYS[:i]))
    assert engine.flush(60)
    assert in_shared(shared) == 6
    assert len(list(local.pending())) == 6


def test_before_eviction_loses_no_page_whatever_is_evicted(open_engine: Open) -> None:
    local, shared = MemoryTier(12 * PAGE, name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared, upload="before_eviction")
    chains = [make_chain(NAMESPACE, 3, str(i)).keys() for i in range(9)]
    for keys in chains:
        spill(engine, keys)
        assert engine.flush(60)
    for keys in chains:
        results = load(engine, keys)
        assert {one.tier for one in results} <= {LOCAL, SHARED}


def test_deferred_pages_survive_a_restart(open_engine: Open) -> None:
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    spill(open_engine(local, shared, upload="before_eviction"), KEYS)
    assert len(list(local.pending())) == 12
    engine = open_engine(local, shared)
    assert engine.flush(60)
    assert in_shared(shared) == 12


def test_clear_forgets_deferred_pages(open_engine: Open) -> None:
    local, shared = MemoryTier(12 * PAGE, name=LOCAL), MemoryTier(name=SHARED)
    engine = open_engine(local, shared, upload="before_eviction")
    spill(engine, KEYS[:6])
    engine.clear(NAMESPACE.digest)
    spill(engine, KEYS)
    assert engine.flush(60)
    assert in_shared(shared) == 12  # consecutive pages are uploaded together
    assert load(engine, KEYS) == loaded_from(LOCAL, 12)


@given(
    turns=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=12),
)
def test_no_rule_leaves_a_hole_in_the_shared_tier(
    open_engine_once: Open, turns: list[tuple[int, int]]
) -> None:
    for rule in ("second_use", "before_eviction"):
        shared = MemoryTier(name=SHARED)
        engine = open_engine_once(MemoryTier(24 * PAGE, name=LOCAL), shared, upload=rule)
        sessions = {i: make_chain(NAMESPACE, 48, str(i)).keys() for i in range(3)}
        lengths = dict.fromkeys(sessions, 0)
        for session, new in turns:
            keys, done = sessions[session], lengths[session]
            found = engine.lookup(make_chain(NAMESPACE, 48, str(session))).length
            load_any(engine, keys[:found])
            start = min(found, done)
            spill(engine, keys[start : done + new], before=hashes(keys[:start]))
            lengths[session] = done + new
            assert engine.flush(60)
            for chain in sessions.values():
                in_shared(shared, chain)
        engine.close(drain=0)


def test_upload_rules_need_every_page_on_the_disk() -> None:
    with pytest.raises(ConfigError, match=r"engine.upload.*engine.admission.*always"):
        load_config(
            environ={}, overrides={"engine.upload": "second_use", "engine.admission": "second_use"}
        )
