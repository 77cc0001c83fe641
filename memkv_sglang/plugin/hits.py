"""How much of a chain can be restored, by the policy of each pool that has to hold a part of it.

Policies and their meaning: `PoolHitPolicy` in SGLang's `mem_cache/hicache_storage.py`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class PoolHit(NamedTuple):
    """What one pool says about a chain."""

    pages: int
    """The longest prefix that this pool can serve."""
    restorable: Sequence[int]
    """Every length, from 1, that it can serve; in rising order."""


def whole_prefix(pages: int) -> PoolHit:
    """Return the hit of a pool that holds every page of the prefix."""
    return PoolHit(pages, range(1, pages + 1))


def trailing_window(present: Sequence[bool], window: int) -> PoolHit:
    """Return the hit of a pool that must hold the last `window` pages of the prefix.

    Near the start of the chain, where there are fewer, all of them.
    """
    runs = accumulate(present, lambda run, there: run + 1 if there else 0, initial=0)
    restorable = [n for n, run in enumerate(runs) if n and run >= min(window, n)]
    return PoolHit(restorable[-1] if restorable else 0, restorable)


def block_pages(pages: int, block: int, group: int) -> list[list[int]]:
    """Return, for each whole block of a span, which pages' keys name its group.

    A block covers `block` pages; its second form is kept under the keys of its last `group`.
    """
    if not 0 < group <= block:
        return []
    return [list(range(end - group, end)) for end in range(block, pages + 1, block)]


def leading_blocks(groups: Sequence[Sequence[bool]], block: int) -> int:
    """Return how many pages the leading complete groups cover."""
    complete = next((i for i, group in enumerate(groups) if not all(group)), len(groups))
    return complete * block


def intersect(hits: Sequence[PoolHit]) -> list[int]:
    """Return the lengths that every pool can serve, in rising order."""
    common = set(hits[0].restorable).intersection(*(hit.restorable for hit in hits[1:]))
    return sorted(common)
