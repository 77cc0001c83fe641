"""Results of the engine's calls."""

from typing import NamedTuple

from memkv_sglang.tiers.base import LoadResult


class PageLoad(NamedTuple):
    """Result of loading a page, and the tier it came from (empty unless `LOADED`)."""

    result: LoadResult
    tier: str = ""


class Arrival(NamedTuple):
    """A `PageLoad` with the checksum of the page's content."""

    result: LoadResult
    tier: str = ""
    checksum: bytes | None = None
    """The checksum that the tier verified; None unless `LOADED`."""


class Removal(NamedTuple):
    """Result of clearing a namespace."""

    pages: int
    """Deleted copies in all tiers."""
    complete: bool
    """False if pages may be left: a tier was unreachable, or calls were still in flight."""


class Warming(NamedTuple):
    """Numbers of pages by the result of warming."""

    present: int = 0
    """Already on this node's disk."""
    copied: int = 0
    """Copied from the shared tier."""
    missing: int = 0
    """Not loaded from the shared tier."""
    refused: int = 0
    """Not stored on the disk, for lack of space."""
