"""The conversations of the benchmark `traffic` have the structure of the trace's sessions."""

from os.path import commonprefix

from benchmarks.scale.cases import agents
from benchmarks.traffic.conversations import BLOCK, LONGEST, SCALE, draw

COUNT, TURNS = 40, 5


def test_turns_reuse_as_much_as_in_the_trace() -> None:
    reused = sent = 0
    for turns in draw(COUNT, TURNS, "seed", "content"):
        for before, turn in zip(turns, turns[1:], strict=False):
            assert len(turn.tokens) <= LONGEST // SCALE
            reused += len(commonprefix([before.tokens, turn.tokens]))
            sent += len(turn.tokens)
    assert 0.85 < reused / sent < 1  # the trace: 0.96, with compactions


def test_only_sessions_of_a_group_begin_with_the_same_tokens() -> None:
    drawn = draw(COUNT, 1, "seed", "content")
    common = [
        len(commonprefix([one.tokens, other.tokens]))
        for i, (one,) in enumerate(drawn)
        for (other,) in drawn[:i]
    ]
    shared = {template.shared_pages * BLOCK // SCALE for template in agents()}
    assert 0 < len([length for length in common if length > 50]) < len(common)
    assert max(common) <= max(shared) + 4  # tokens that are equal by chance


def test_other_content_has_the_same_shape_and_no_common_prefix() -> None:
    one, other = (draw(COUNT, TURNS, "seed", content) for content in ("one", "other"))
    for mine, its in zip(one, other, strict=True):
        assert [len(turn.tokens) for turn in mine] == [len(turn.tokens) for turn in its]
        assert [turn.think for turn in mine] == [turn.think for turn in its]
        assert len(commonprefix([mine[0].tokens, its[0].tokens])) < 4
