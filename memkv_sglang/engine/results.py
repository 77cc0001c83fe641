"""What the engine's calls return, for callers that import nothing else of it."""

from typing import NamedTuple

from memkv_sglang.tiers.base import LoadResult


class PageLoad(NamedTuple):
    """What became of a page, and which tier it came from (empty unless `LOADED`)."""

    result: LoadResult
    tier: str = ""


class Arrival(NamedTuple):
    """A `PageLoad` with the checksum that vouches for the page's content."""

    result: LoadResult
    tier: str = ""
    checksum: bytes | None = None
    """What the tier verified the content against; None unless `LOADED`."""


class Removal(NamedTuple):
    """What became of a namespace that was to be cleared."""

    pages: int
    """Copies removed, over all tiers."""
    complete: bool
    """False if a tier could not be reached or earlier calls did not end: pages may be left."""


class Warming(NamedTuple):
    """What became of pages that were to be on this node's disk."""

    present: int = 0
    """Were there already."""
    copied: int = 0
    missing: int = 0
    """Could not be loaded from the shared tier."""
    refused: int = 0
    """Found no room on the disk."""
