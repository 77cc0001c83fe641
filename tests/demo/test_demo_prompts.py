from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from memkv_testbed.demo.prompts import (
    CONTEXT_TOKENS,
    FOLLOW_UP_TOKENS,
    History,
    Script,
    change_token,
    common_prefix,
)

PAGE = 4
TOKENS = st.lists(st.integers(5, 7), min_size=1, max_size=40)


class Bytes:
    """A tokenizer with one token per byte."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids = list(ids)

    def encode(self, text: str) -> "Bytes":
        return Bytes(text.encode())


@given(known=st.lists(TOKENS, max_size=5), prompt=TOKENS)
def test_reusable_is_the_longest_stored_run_of_whole_pages(
    known: list[list[int]], prompt: list[int]
) -> None:
    history = History(PAGE)
    for sequence in known:
        history.add(None, sequence)
    reusable = history.reusable(None, prompt)
    assert reusable % PAGE == 0
    assert reusable < len(prompt)
    stored = [sequence[:reusable] for sequence in known]
    assert reusable == 0 or prompt[:reusable] in stored
    longer = reusable + PAGE
    assert longer >= len(prompt) or prompt[:longer] not in [each[:longer] for each in known]


def test_nothing_is_reusable_under_another_salt() -> None:
    history = History(PAGE)
    history.add("one", [5] * 16)
    assert history.reusable("one", [5] * 16) == 12
    assert history.reusable("two", [5] * 16) == history.reusable(None, [5] * 16) == 0


@given(tokens=TOKENS, data=st.data())
def test_exactly_one_token_changes(tokens: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(tokens) - 1))
    tokens = [*tokens, 8]
    changed = change_token(tokens, position)
    assert common_prefix(tokens, changed) == position
    assert changed[position + 1 :] == tokens[position + 1 :]


def test_conversation_is_the_same_in_every_run_and_grows_by_pages() -> None:
    script, again = Script(Bytes()), Script(Bytes())
    assert script.opening() == again.opening()
    assert CONTEXT_TOKENS < len(script.opening()) < CONTEXT_TOKENS + 100
    assert [len(script.follow_up(turn)) for turn in (2, 3)] == [FOLLOW_UP_TOKENS] * 2
    assert common_prefix(script.warm_up(0), script.warm_up(1)) < PAGE * 3


def test_context_has_the_chosen_length_and_the_token_changes_within_it() -> None:
    short = Script(Bytes(), 4096)
    assert 4096 < len(short.opening()) < 4096 + 100
    assert short.opening()[:4096] == Script(Bytes()).opening()[:4096]
    assert 4096 * 3 // 4 < short.changed_position < 4096
