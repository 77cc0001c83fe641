"""The prompts of the demo: a long shared context, questions about it, and one changed token."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Tokens = list[int]

CONTEXT_TOKENS = 16384
LEAST_CONTEXT_TOKENS = 4096

FOLLOW_UP_TOKENS = 256
"""Characters of a later question. With its answer it is longer than a page, so each turn adds one.
"""

WORDS = ["amber", "basin", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "island"]
WORDS += ["juniper", "kelp", "lagoon", "meadow", "nectar", "orchid", "quartz", "river", "zephyr"]


def load_tokenizer(model: Path) -> Any:
    """Return the model's tokenizer, which has one token per byte."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


class Script:
    """Creates the prompts. The tokenizer needs `encode(text).ids`."""

    def __init__(self, tokenizer: Any, context_tokens: int = CONTEXT_TOKENS) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens

    @property
    def changed_position(self) -> int:
        """Position in the context of the token that is changed once. It is near the end."""
        return self._context_tokens * 11 // 12

    def opening(self) -> Tokens:
        """Return the context and the first question about it."""
        context = "Field notes of the survey.\n" + _prose(0, self._context_tokens)
        return self._encode(context[: self._context_tokens] + "\n\nQ: Where did it begin?\nA:")

    def follow_up(self, number: int) -> Tokens:
        """Return the question of turn `number` (2 or higher), which follows the last answer."""
        return self._encode(("\n\nQ: And " + _prose(number, FOLLOW_UP_TOKENS))[:FOLLOW_UP_TOKENS])

    def warm_up(self, number: int) -> Tokens:
        """Return a short prompt that shares no prefix with others."""
        return self._encode(f"Warm-up {number}. " + _prose(100 + number, 1500))

    def _encode(self, text: str) -> Tokens:
        tokens: Tokens = self._tokenizer.encode(text).ids
        return tokens


def _prose(seed: int, length: int) -> str:
    """Return sentences with at least `length` characters in total."""
    choose = random.Random(seed)  # noqa: S311 (the same text in every run)
    sentences: list[str] = []
    size = 0
    while size < length:
        words = choose.sample(WORDS, 6)
        sentence = f"Day {len(sentences) + 1}: {' '.join(words)}, {choose.randrange(1000)} paces. "
        sentences.append(sentence)
        size += len(sentence)
    return "".join(sentences)


def change_token(tokens: Sequence[int], position: int) -> Tokens:
    """Return a copy with a different token at `position`."""
    changed = list(tokens)
    changed[position] = tokens[position] + 1 if tokens[position] < max(tokens) else min(tokens)
    return changed


class History:
    """All sequences that the nodes have computed, which are what a perfect cache could reuse."""

    def __init__(self, page_size: int) -> None:
        self._page = page_size
        self._computed: dict[str | None, list[Tokens]] = {}

    def add(self, salt: str | None, sequence: Tokens) -> None:
        """Record a prompt with its answer, except for the last token, which has no KV yet."""
        self._computed.setdefault(salt, []).append(sequence)

    def reusable(self, salt: str | None, prompt: Tokens) -> int:
        """Return how many tokens of `prompt` could be reused.

        That is the longest common prefix with a sequence of the same salt, rounded down to whole
        pages. The last token of the prompt is never reused.
        """
        common = max(
            (common_prefix(prompt, known) for known in self._computed.get(salt, [])), default=0
        )
        return min(common, len(prompt) - 1) // self._page * self._page


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
