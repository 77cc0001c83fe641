"""Leaves are evicted before roots for any history of uses, in a simulated bucket."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.minio.retention.collector.order import (
    EvictionQueue,
    StoredPage,
    eviction_order,
)

PERIOD = 10.0
Path = tuple[int, ...]

uses = st.lists(
    st.tuples(
        st.integers(0, 7).map(float),  # seconds since the previous use
        st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple),  # a chain in a binary tree
    ),
    min_size=1,
    max_size=40,
)


def modified_times(history: Sequence[tuple[float, Path]]) -> tuple[dict[Path, float], float]:
    """Return what the objects' times are after these uses, and the time then.

    Spilled or touched from the root on, each page once in a period.
    """
    now, times = 0.0, dict[Path, float]()
    for pause, path in history:
        now += pause
        for end in range(1, len(path) + 1):
            page = path[:end]
            if page not in times or times[page] // PERIOD < now // PERIOD:
                times[page] = now
            now += 1e-3
    return times, now


@given(uses)
def test_no_page_is_removed_before_its_descendants(history: Sequence[tuple[float, Path]]) -> None:
    times, now = modified_times(history)
    order = eviction_order(PERIOD, now + PERIOD)
    for page, modified in times.items():
        if len(page) > 1:
            assert order(modified) <= order(times[page[:-1]])


@given(uses, st.integers(1, 10))
def test_the_queue_keeps_the_first_pages_in_order(
    history: Sequence[tuple[float, Path]], limit: int
) -> None:
    times, now = modified_times(history)
    order = eviction_order(PERIOD, now)
    pages = [
        StoredPage(PageKey(b"n", bytes(page)), 1, modified) for page, modified in times.items()
    ]
    first = EvictionQueue(order, limit)
    for page in pages:
        first.offer(page)
    expected = sorted(order(page.modified) for page in pages)[:limit]
    assert [order(page.modified) for page in first.take()] == expected
    assert first.overflowed == (len(pages) > limit)


def test_pages_of_the_current_period_are_removed_last_and_oldest_first() -> None:
    order = eviction_order(PERIOD, 25.0)
    assert sorted([3.0, 8.0, 12.0, 18.0, 21.0, 24.0], key=order) == [8, 3, 18, 12, 21, 24]
