"""What the engine's calls return, for callers that import nothing else of it."""

from typing import NamedTuple

from memkv_sglang.tiers.base import LoadResult


class PageLoad(NamedTuple):
    """What became of a page, and which tier it came from (empty unless `LOADED`)."""

    result: LoadResult
    tier: str = ""
