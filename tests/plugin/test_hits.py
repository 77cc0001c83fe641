"""The hits that the pools report for a chain match each policy's definition."""

from hypothesis import given
from hypothesis import strategies as st

from memkv_sglang.plugin.hits import (
    block_pages,
    intersect,
    leading_blocks,
    trailing_window,
    whole_prefix,
)

presence = st.lists(st.booleans(), max_size=24)


@given(presence, st.integers(1, 8))
def test_a_trailing_window_is_complete_where_it_is_restorable(
    present: list[bool], window: int
) -> None:
    expected = [n for n in range(1, len(present) + 1) if all(present[max(0, n - window) : n])]
    hit = trailing_window(present, window)
    assert list(hit.restorable) == expected
    assert hit.pages == max(expected, default=0)


@given(presence, presence, st.integers(1, 4), st.integers(0, 24))
def test_a_model_needs_all_of_its_pools(
    first: list[bool], second: list[bool], window: int, pages: int
) -> None:
    hits = [trailing_window(first, window), trailing_window(second, 1), whole_prefix(pages)]
    expected = [n for n in range(25) if all(n in hit.restorable for hit in hits)]
    assert intersect(hits) == expected


@given(st.integers(0, 24), st.integers(1, 6), st.integers(1, 6), st.data())
def test_leading_blocks_are_complete(
    pages: int, block: int, group: int, data: st.DataObject
) -> None:
    blocks = block_pages(pages, block, group)
    if group > block:
        assert blocks == []
        return
    assert len(blocks) == pages // block
    for number, members in enumerate(blocks, 1):
        assert members == list(range(number * block - group, number * block))
    there = [data.draw(st.booleans()) for _ in blocks]
    covered = leading_blocks([[there[i]] for i in range(len(blocks))], block)
    assert covered == block * (there.index(False) if False in there else len(there))
