"""A measured tier reports to the metrics, and learns its speed only from loads that show it."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from typing_extensions import override

from memkv_sglang.engine.measured import MeasuredTier
from memkv_sglang.engine.speed import TierSpeed
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page
from memkv_sglang.testing.pages import make_chain, make_page
from memkv_sglang.tiers.base import Fetched, LoadResult
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import WrapperTier
from tests.engine.engines import LENGTHS, LOCAL, NAMESPACE, put

KEYS = make_chain(NAMESPACE, 4).keys()
PAGE = sum(LENGTHS)


class RecordedSpeed(TierSpeed):
    """Records of each load the bytes asked for, the bytes moved, and whether it was cut short."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[int, int, bool]] = []

    @override
    def end(self, size: int, moved: int, *, cut_short: bool = False) -> None:
        super().end(size, moved, cut_short=cut_short)
        self.reports.append((size, moved, cut_short))


class FailingTier(WrapperTier):
    """Fails every second page of a load, at once or at the deadline."""

    late = False

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        outcomes = super().fetch(pages, deadline)
        while self.late and time.monotonic() < deadline:
            time.sleep(0.001)
        outcomes[1::2] = [Fetched(LoadResult.FAILED)] * len(outcomes[1::2])
        return outcomes


def load(tier: MeasuredTier, seconds: float) -> None:
    pages = [make_page(key, LENGTHS, filled=False) for key in KEYS]
    tier.load(pages, time.monotonic() + seconds)


def measured(inner: WrapperTier | MemoryTier) -> tuple[MeasuredTier, RecordedSpeed]:
    tier, speed = MeasuredTier(inner, Metrics(CollectorRegistry()).calls), RecordedSpeed()
    tier.speed = speed
    return tier, speed


def stored() -> MemoryTier:
    inner = MemoryTier(name=LOCAL)
    put(inner, KEYS)
    return inner


def test_complete_load_shows_the_speed() -> None:
    tier, speed = measured(stored())
    load(tier, 60)
    assert speed.reports == [(4 * PAGE, 4 * PAGE, False)]


def test_fault_before_the_deadline_says_nothing_about_the_speed() -> None:
    tier, speed = measured(FailingTier(stored()))
    load(tier, 60)
    assert speed.reports == [(4 * PAGE, 0, False)]
    assert speed.seconds(1, PAGE) == 0


def test_load_cut_short_by_its_deadline_shows_the_speed() -> None:
    failing = FailingTier(stored())
    failing.late = True
    tier, speed = measured(failing)
    load(tier, 0.02)
    assert speed.reports == [(4 * PAGE, 2 * PAGE, True)]


def test_pages_bytes_and_time_are_counted_once() -> None:
    registry = CollectorRegistry()
    tier = MeasuredTier(FailingTier(stored()), Metrics(registry).calls)
    load(tier, 60)
    labels = {"tier": LOCAL, "operation": "load"}
    value = registry.get_sample_value
    assert value("memkv_pages_total", {**labels, "result": "loaded"}) == 2
    assert value("memkv_pages_total", {**labels, "result": "failed"}) == 2
    assert value("memkv_bytes_total", labels) == 2 * PAGE
    assert value("memkv_call_duration_seconds_count", labels) == 1
