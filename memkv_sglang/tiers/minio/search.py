"""The length of the longest present prefix, found with few rounds of questions."""

from collections.abc import Callable, Sequence
from math import ceil, log

Probe = Callable[[Sequence[int]], Sequence[bool] | None]
"""Tells for each position whether that page is present; None when time is up."""

WIDTHS = (4, 8, 16, 32, 64)
"""How many questions a round may ask."""

QUESTION_COST = 4e-4
"""Seconds that a question costs the server besides the network."""


def longest_prefix(low: int, high: int, probe: Probe, width: int) -> tuple[int, int]:
    """Return bounds of the number of present pages; equal unless time ran out.

    At least `low` and at most `high` pages are present, counted from the start; presence is
    monotone. The first round asks for the first unknown page: where nothing more is present, it is
    the only round.
    """
    positions = [low, *split(low + 1, high, width - 1)] if low < high else []
    while positions:
        answers = probe(positions)
        if answers is None:
            break
        for position, present in zip(positions, answers, strict=True):
            if not present:
                high = position
                break
            low = position + 1
        positions = split(low, high, width)
    return low, high


def split(low: int, high: int, width: int) -> list[int]:
    """Return up to `width` positions in `[low, high)` that part the answers `low..high` evenly."""
    unknown = high - low
    if unknown <= width:
        return list(range(low, high))
    return [low + (i * (unknown + 1)) // (width + 1) - 1 for i in range(1, width + 1)]


def best_width(pages: int, round_trip: float) -> int:
    """Return how many questions a round should ask: few when near, more when a round is dear."""

    def cost(width: int) -> float:
        return ceil(log(pages + 1, width + 1)) * (round_trip + width * QUESTION_COST)

    return min(WIDTHS, key=cost)
