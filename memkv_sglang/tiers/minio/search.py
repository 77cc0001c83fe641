"""Find the longest present prefix of a chain in few round trips."""

from collections.abc import Callable, Sequence
from math import ceil, log

Probe = Callable[[Sequence[int]], Sequence[bool] | None]
"""Returns whether the page at each position is present; None if the deadline passed."""

WIDTHS = (4, 8, 16, 32, 64)
"""The numbers of probes per round to choose from."""

PROBE_COST = 4e-4
"""Seconds that a probe takes on the server, without the network."""


def longest_prefix(low: int, high: int, probe: Probe, width: int) -> tuple[int, int]:
    """Return bounds of the number of present pages, which are equal unless time ran out.

    The number is at least `low` and at most `high`, counted from the start without gaps. The first
    round includes the first unknown page. If that page is missing, no other round is needed.
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
    """Return up to `width` positions in `[low, high)` that divide the range evenly."""
    unknown = high - low
    if unknown <= width:
        return list(range(low, high))
    return [low + (i * (unknown + 1)) // (width + 1) - 1 for i in range(1, width + 1)]


def best_width(pages: int, round_trip: float) -> int:
    """Return the best number of probes per round, which grows with the round-trip time."""

    def cost(width: int) -> float:
        return ceil(log(pages + 1, width + 1)) * (round_trip + width * PROBE_COST)

    return min(WIDTHS, key=cost)
