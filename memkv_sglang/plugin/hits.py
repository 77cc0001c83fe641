"""Compute how much of a chain can be restored if several pools hold parts of it.

Each pool has a policy: `PoolHitPolicy` in SGLang's `mem_cache/hicache_storage.py`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple


class PoolHit(NamedTuple):
    """The prefixes of a chain that one pool can serve."""

    pages: int
    """Length of the longest prefix."""
    restorable: Sequence[int]
    """The lengths of all prefixes, in ascending order."""


def whole_prefix(pages: int) -> PoolHit:
    """Return the hit of a pool that holds every page of the prefix."""
    return PoolHit(pages, range(1, pages + 1))


def trailing_window(present: Sequence[bool], window: int) -> PoolHit:
    """Return the hit of a pool that needs only the last `window` pages of a prefix.

    A prefix that is shorter than the window needs all of its pages.
    """
    runs = accumulate(present, lambda run, held: run + 1 if held else 0, initial=0)
    restorable = [n for n, run in enumerate(runs) if n and run >= min(window, n)]
    return PoolHit(restorable[-1] if restorable else 0, restorable)


def block_pages(pages: int, block: int, group: int) -> list[list[int]]:
    """Return, for each complete block of a span, the pages whose keys its group is stored under.

    A block has `block` pages. Its group is stored under the keys of its last `group` pages.
    """
    if not 0 < group <= block:
        return []
    return [list(range(end - group, end)) for end in range(block, pages + 1, block)]


def leading_blocks(groups: Sequence[Sequence[bool]], block: int) -> int:
    """Return how many pages the leading complete groups cover."""
    complete = next((i for i, group in enumerate(groups) if not all(group)), len(groups))
    return complete * block


def intersect(hits: Sequence[PoolHit]) -> list[int]:
    """Return the prefix lengths that every pool can serve, in ascending order."""
    common = set(hits[0].restorable).intersection(*(hit.restorable for hit in hits[1:]))
    return sorted(common)
