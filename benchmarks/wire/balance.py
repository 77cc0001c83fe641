"""How evenly calls keep all shards busy: a model without servers.

Every shard delivers pages at the same rate, shared equally by the calls that wait for it. A caller
starts its next call when all pages of the last one have arrived, as a rank of SGLang does.
"""

import random
from collections import Counter

CALL = 128
"""Pages of a call."""

CALLS = 16
"""Calls in sequence per caller: 2,048 pages."""


def busy_share(callers: int, shards: int, *, alike: bool, seed: int) -> float:
    """Return the share of the shards' total rate that is used until the first caller has finished.

    With `alike`, the n-th calls of all callers are spread over the shards in the same way;
    otherwise each call is spread by itself.
    """
    numbers = random.Random(seed)
    alone = [[_spread(numbers, shards) for _ in range(CALLS)] for _ in range(callers)]
    plan = [iter(alone[0 if alike else caller]) for caller in range(callers)]
    left = [list(next(calls)) for calls in plan]
    rate, now, moved = 1 / shards, 0.0, 0.0
    while True:
        active = [[c for c in range(callers) if left[c][s] > 0] for s in range(shards)]
        step, end = min(
            (left[c][s] * len(waiting) / rate, (c, s))
            for s, waiting in enumerate(active)
            for c in waiting
        )
        for s, waiting in enumerate(active):
            for c in waiting:
                left[c][s] -= step * rate / len(waiting)
            moved += step * rate * bool(waiting)
        now += step
        left[end[0]][end[1]] = 0.0  # removes the rounding error
        for c in range(callers):
            if max(left[c]) < 1e-9:
                following = next(plan[c], None)
                if following is None:
                    return moved / now
                left[c] = list(following)


def _spread(numbers: random.Random, shards: int) -> list[float]:
    counts = Counter(numbers.randrange(shards) for _ in range(CALL))
    return [float(counts[shard]) for shard in range(shards)]
