"""Engines that are closed after each test."""

from collections.abc import Iterator, Sequence

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.single_flight import Follower, SingleFlight
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import Tier
from memkv_sglang.tiers.memory import MemoryTier
from tests.engine.engines import Open


@pytest.fixture
def open_engine() -> Iterator[Open]:
    """Return a function that makes engines; close them at the end."""
    yield from _open_engines()


@pytest.fixture(scope="module")
def open_engine_once() -> Iterator[Open]:
    """Do the same for Hypothesis tests, which share their fixtures between examples."""
    yield from _open_engines()


def _open_engines() -> Iterator[Open]:
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


@pytest.fixture
def waiting_pages(monkeypatch: pytest.MonkeyPatch) -> list[PageKey]:
    """Pages of loads that wait for an equal load in flight, in the order in which they joined."""
    waiting: list[PageKey] = []
    join = SingleFlight.join

    def record(flights: SingleFlight, pages: Sequence[Page]) -> list[Follower | None]:
        followed = join(flights, pages)
        waiting.extend(follower.page.key for follower in followed if follower is not None)
        return followed

    monkeypatch.setattr(SingleFlight, "join", record)
    return waiting
