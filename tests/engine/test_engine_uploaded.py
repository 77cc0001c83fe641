"""Which pages the upload queue skips, and how its reads are counted."""

import time

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.memory import MemoryTier

LENGTHS = (4096, 4096)
NAMESPACE = make_namespace()
KEYS = make_chain(NAMESPACE, 5).keys()


@pytest.mark.parametrize("again", [False, True])
def test_cleared_pages_are_uploaded_when_spilled_again(again: bool) -> None:
    local, shared = MemoryTier(), MemoryTier()
    engine = Engine(local, shared, local, EngineConfig(), Metrics(CollectorRegistry()))
    try:
        for _ in range(2):
            engine.spill([make_page(key, LENGTHS, filled=True) for key in KEYS])
            assert engine.flush(30)
            assert all(shared.present(KEYS, time.monotonic() + 30))
            if again:
                engine.clear(NAMESPACE.digest)
    finally:
        engine.close(drain=0)


def test_collected_pages_are_uploaded_when_spilled_again() -> None:
    """The disk evicted them too, so the record of their upload is stale."""
    local, shared = MemoryTier(), MemoryTier()
    engine = Engine(local, shared, local, EngineConfig(), Metrics(CollectorRegistry()))
    pages = [make_page(key, LENGTHS, filled=True) for key in KEYS]
    try:
        engine.spill(pages)
        assert engine.flush(30)
        for tier in (local, shared):
            tier.remove(KEYS[2:])
        assert engine.lookup(Chain(NAMESPACE.digest, [key.hash for key in KEYS])) == (2, True)
        engine.spill(pages)
        assert engine.flush(30)
        assert all(shared.present(KEYS, time.monotonic() + 30))
    finally:
        engine.close(drain=0)


def test_drops_of_a_full_queue_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    local, shared = MemoryTier(), MemoryTier()
    config = EngineConfig(upload_backlog=1)
    engine = Engine(local, shared, local, config, Metrics(CollectorRegistry()))
    try:
        for key in KEYS:
            engine.spill([make_page(key, LENGTHS, filled=True)])
        assert [record.message for record in caplog.records] == ["uploads dropped"]
    finally:
        engine.close(drain=0)


def test_reads_for_uploads_are_not_counted_as_loads() -> None:
    registry = CollectorRegistry()
    local, shared = MemoryTier(), MemoryTier()
    engine = Engine(local, shared, local, EngineConfig(), Metrics(registry))
    try:
        engine.spill([make_page(key, LENGTHS, filled=True) for key in KEYS])
        assert engine.flush(30)
        assert all(shared.present(KEYS, time.monotonic() + 30))
        labels = {"tier": local.name, "operation": "load", "result": "loaded"}
        assert registry.get_sample_value("memkv_pages_total", labels) == 0
    finally:
        engine.close(drain=0)
