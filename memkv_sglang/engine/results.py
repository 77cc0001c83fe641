"""What the engine's calls return, for callers that import nothing else of it."""

from typing import NamedTuple

from memkv_sglang.tiers.base import LoadResult


class PageLoad(NamedTuple):
    """What became of a page, and which tier it came from (empty unless `LOADED`)."""

    result: LoadResult
    tier: str = ""


class Removal(NamedTuple):
    """What became of a namespace that was to be cleared."""

    pages: int
    """Copies removed, over all tiers."""
    complete: bool
    """False if a tier could not be reached, and may still hold pages."""
