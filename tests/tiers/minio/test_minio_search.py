from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.tiers.minio.search import WIDTHS, best_width, longest_prefix, split


class Server:
    """Holds the first `present` pages; counts rounds, and fails after `limit` of them."""

    def __init__(self, present: int, limit: int = 10_000) -> None:
        self.present, self.limit, self.rounds, self.widest = present, limit, 0, 0

    def __call__(self, positions: Sequence[int]) -> list[bool] | None:
        if self.rounds == self.limit:
            return None
        self.rounds += 1
        self.widest = max(self.widest, len(positions))
        return [position < self.present for position in positions]


@st.composite
def searches(draw: st.DrawFn) -> tuple[int, int, int, int]:
    high = draw(st.integers(0, 5000))
    low = draw(st.integers(0, high))
    return low, high, draw(st.integers(low, high)), draw(st.sampled_from([2, 3, *WIDTHS]))


def rounds_needed(unknown: int, width: int) -> int:
    rounds = 0
    while unknown:
        unknown = 0 if unknown <= width else -(-(unknown + 1) // (width + 1)) - 1
        rounds += 1
    return rounds


@given(searches())
def test_answer_is_exact_in_few_rounds(search: tuple[int, int, int, int]) -> None:
    low, high, present, width = search
    server = Server(present)
    assert longest_prefix(low, high, server, width) == (present, present)
    assert server.widest <= width
    first_round_leaves = -(-(high - low) // width)
    assert server.rounds <= 1 + rounds_needed(first_round_leaves, width)


@given(searches())
def test_unchanged_prefix_takes_one_round(search: tuple[int, int, int, int]) -> None:
    low, high, _, width = search
    server = Server(low)
    longest_prefix(low, high, server, width)
    assert server.rounds == min(1, high - low)


@given(searches(), st.integers(0, 5))
def test_bounds_hold_when_time_runs_out(search: tuple[int, int, int, int], limit: int) -> None:
    low, high, present, width = search
    found, bound = longest_prefix(low, high, Server(present, limit), width)
    assert low <= found <= present <= bound <= high


@given(st.lists(st.booleans(), max_size=300), st.sampled_from(WIDTHS))
def test_search_ends_despite_gaps(pages: list[bool], width: int) -> None:
    found, bound = longest_prefix(0, len(pages), lambda at: [pages[i] for i in at], width)
    assert found == bound
    assert found == len(pages) or not pages[found]
    assert found == 0 or pages[found - 1]


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 64))
def test_split_parts_evenly(low: int, unknown: int, width: int) -> None:
    positions = split(low, low + unknown, width)
    assert len(positions) == min(width, unknown)
    edges = [low - 1, *positions, low + unknown]
    answers = [after - before for before, after in pairwise(edges)]
    assert min(answers) >= 1
    assert max(answers) - min(answers) <= 1


@pytest.mark.parametrize(("round_trip", "width"), [(0.0001, 4), (0.05, 64)])
def test_slow_round_trips_get_more_probes(round_trip: float, width: int) -> None:
    assert best_width(2048, round_trip) == width
