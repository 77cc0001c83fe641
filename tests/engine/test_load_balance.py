"""`engine.balance_loads`: loads use both tiers while the disk is the bottleneck."""

import time
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry
from typing_extensions import override

from memkv_sglang.engine.changed import ChangedPages
from memkv_sglang.engine.load import Loader
from memkv_sglang.engine.load_balance import LoadBalancer
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.engine.speed import TierSpeed
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.memory import MemoryTier
from tests.engine.engines import LENGTHS, LOCAL, NAMESPACE, SHARED, loaded_from, put

PAGE = sum(LENGTHS)
KEYS = make_chain(NAMESPACE, 16).keys()
PAGES = [make_page(key, LENGTHS, filled=False) for key in KEYS]
EVERY = range(len(PAGES))


def known(seconds_per_page: float) -> TierSpeed:
    """Return the speed of a tier that has been measured, at a frozen time."""
    now = [0.0]
    speed = TierSpeed(lambda: now[0])
    for pages in (1, 100):
        speed.begin(pages * PAGE)
        now[0] += pages * seconds_per_page
        speed.end(pages * PAGE, pages * PAGE)
    return speed


def has_all(_: PageKey) -> bool:
    return False


@pytest.mark.parametrize(
    ("disk", "bucket", "moved"),
    [(1.0, 1.0, 8), (3.0, 1.0, 12), (1.0, 3.0, 4), (1.0, 50.0, 0), (50.0, 0.1, 16)],
)
def test_both_tiers_end_at_the_same_time(disk: float, bucket: float, moved: int) -> None:
    balancer = LoadBalancer(known(disk), known(bucket), has_all)
    assert balancer.choose(PAGES, EVERY, []) == list(EVERY)[len(PAGES) - moved :]


def test_work_in_flight_counts() -> None:
    disk, bucket = known(1.0), known(1.0)
    balancer = LoadBalancer(disk, bucket, has_all)
    bucket.begin(100 * PAGE)
    assert balancer.choose(PAGES, EVERY, []) == []
    bucket.end(100 * PAGE, 0)
    disk.begin(100 * PAGE)
    assert balancer.choose(PAGES, EVERY, []) == list(EVERY)


def test_an_unknown_speed_moves_nothing() -> None:
    assert LoadBalancer(known(1.0), TierSpeed(), has_all).choose(PAGES, EVERY, []) == []
    assert LoadBalancer(TierSpeed(), known(1.0), has_all).choose(PAGES, EVERY, []) == []


def test_pages_that_wait_for_upload_stay() -> None:
    waiting = set(KEYS[10:])
    balancer = LoadBalancer(known(1.0), known(1.0), waiting.__contains__)
    assert balancer.choose(PAGES, EVERY, []) == [8, 9]


class MoveLast(LoadBalancer):
    """Moves the last half of the pages on disk."""

    def __init__(self) -> None:
        pass

    @override
    def choose(self, pages: Sequence[Page], near: Sequence[int], far: Sequence[int]) -> list[int]:
        return list(near[len(near) // 2 :])


def test_moved_pages_come_from_the_bucket_or_else_from_disk() -> None:
    registry = CollectorRegistry()
    local, shared = MemoryTier(name=LOCAL), MemoryTier(name=SHARED)
    put(local, KEYS[:8])
    put(shared, [*KEYS[:6], *KEYS[8:]])  # the last two on disk are not in the bucket
    metrics = Metrics(registry)
    loader = Loader(local, shared, None, metrics, ChangedPages(metrics), MoveLast())
    pages = [make_page(key, LENGTHS, filled=False) for key in KEYS]
    loads = loader.load(pages, time.monotonic() + 60)
    loader.close()
    assert loads[:4] == loaded_from(LOCAL, 4)
    assert loads[4:6] == loaded_from(SHARED, 2)
    assert loads[6:8] == loaded_from(LOCAL, 2)
    assert loads[8:] == loaded_from(SHARED, 8)
    for page, key in zip(pages, KEYS, strict=True):
        filled = make_page(key, LENGTHS, filled=True)
        assert [bytes(part) for part in page.buffers] == [bytes(part) for part in filled.buffers]
    assert registry.get_sample_value("memkv_balanced_pages_total") == 2


def test_an_empty_bucket_loses_no_page() -> None:
    metrics = Metrics(CollectorRegistry())
    local = MemoryTier(name=LOCAL)
    put(local, KEYS)
    loader = Loader(
        local, MemoryTier(name=SHARED), None, metrics, ChangedPages(metrics), MoveLast()
    )
    pages = [make_page(key, LENGTHS, filled=False) for key in KEYS]
    assert loader.load(pages, time.monotonic() + 60) == [PageLoad(LoadResult.LOADED, LOCAL)] * 16
    loader.close()
