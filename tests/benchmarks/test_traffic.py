"""The conversations of the benchmark `traffic` have the structure of the trace's sessions."""

from collections.abc import Sequence
from itertools import pairwise, takewhile

from benchmarks.scale.cases import agents
from benchmarks.traffic.conversations import BLOCK, LONGEST, SCALE, draw

COUNT, TURNS = 40, 5


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_turns_reuse_as_much_as_in_the_trace() -> None:
    reused = sent = 0
    for turns in draw(COUNT, TURNS, "seed", "content"):
        for before, turn in pairwise(turns):
            assert len(turn.tokens) <= LONGEST // SCALE
            reused += common(before.tokens, turn.tokens)
            sent += len(turn.tokens)
    assert 0.85 < reused / sent < 1  # 0.96 in the trace, which includes compactions


def test_only_sessions_of_a_group_begin_with_the_same_tokens() -> None:
    drawn = draw(COUNT, 1, "seed", "content")
    lengths = [
        common(one.tokens, other.tokens) for i, (one,) in enumerate(drawn) for (other,) in drawn[:i]
    ]
    shared = {template.shared_pages * BLOCK // SCALE for template in agents()}
    assert 0 < len([length for length in lengths if length > 50]) < len(lengths)
    assert max(lengths) <= max(shared) + 4  # a few tokens may be equal by chance


def test_other_content_has_the_same_shape_and_no_common_prefix() -> None:
    one, other = (draw(COUNT, TURNS, "seed", content) for content in ("one", "other"))
    for mine, its in zip(one, other, strict=True):
        assert [len(turn.tokens) for turn in mine] == [len(turn.tokens) for turn in its]
        assert [turn.think for turn in mine] == [turn.think for turn in its]
        assert common(mine[0].tokens, its[0].tokens) < 4
