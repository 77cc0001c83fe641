"""Sessions of coding agents, with contexts and think times scaled to a tiny model."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.scale.cases import agents
from benchmarks.serving import Tokens
from memkv_sglang.planning.workload import Template, TemplateTurn

SCALE = 32
"""Tokens of the trace per token that is sent."""

BLOCK = 64
"""Tokens of the trace per block."""

THINK_SCALE, LONGEST_THINK = 8.0, 4.0
"""Divisor of think times, and their maximum in seconds after the division."""

LONGEST = 150_000
"""Longest prompt to draw, in tokens of the trace."""


class Turn(NamedTuple):
    """A request."""

    think: float
    """Seconds since the answer to the previous turn."""
    tokens: Tokens


Conversation = Sequence[Turn]


def draw(count: int, turns: int, seed: str, content: str) -> list[Conversation]:
    """Draw `count` different sessions, and `turns` consecutive turns of each.

    Sessions with many turns are drawn more often, so that the turns are typical of the trace.
    Conversations with equal `seed` have the same shape. Their tokens differ if `content` differs.
    """
    rng = random.Random(seed)
    pieces = [piece for template in agents() if (piece := _piece(template, turns, rng))]
    # Weighted sampling without replacement (Efraimidis and Spirakis, 2006).
    pieces.sort(key=lambda piece: rng.random() ** (1 / len(piece[0].turns)), reverse=True)
    return [
        _scaled(template, first, turns, f"{content} {number}", content)
        for number, (template, first) in enumerate(pieces[:count])
    ]


def _piece(template: Template, turns: int, rng: random.Random) -> tuple[Template, int] | None:
    """Choose where in a session to begin; None if it has too few turns that are short enough."""
    possible = [
        first
        for first in range(len(template.turns) - turns + 1)
        if all(turn.tokens <= LONGEST for turn in template.turns[first : first + turns])
    ]
    return (template, rng.choice(possible)) if possible else None


def _scaled(template: Template, first: int, turns: int, session: str, content: str) -> list[Turn]:
    """Scale some turns. Sessions of a group begin with the same tokens."""
    group = f"{content} group {template.group}"
    blocks: dict[str, Tokens] = {}

    def tokens_of(turn: TemplateTurn, number: int) -> Tokens:
        tokens: Tokens = []
        names = [block for start, count in turn.blocks for block in range(start, start + count)]
        for position, block in enumerate(names):
            name = f"{group if position < template.shared_pages else session}, {block}"
            if name not in blocks:
                blocks[name] = _random_tokens(name, BLOCK // SCALE)
            tokens += blocks[name]
        rest = max(1, (turn.tokens - BLOCK * turn.pages) // SCALE)
        return tokens + _random_tokens(f"{session}, rest {number}", rest)

    return [
        Turn(min(turn.think / THINK_SCALE, LONGEST_THINK), tokens_of(turn, first + number))
        for number, turn in enumerate(template.turns[first : first + turns])
    ]


def _random_tokens(name: str, length: int) -> Tokens:
    return random.Random(name).choices(range(5, 261), k=length)
