"""Results of the engine's calls."""

from typing import NamedTuple

from memkv_sglang.tiers.base import LoadResult


class PageLoad(NamedTuple):
    """The result of loading a page, and the tier that it came from (empty unless `LOADED`)."""

    result: LoadResult
    tier: str = ""


class Arrival(NamedTuple):
    """A `PageLoad` with the checksum of the page's content."""

    result: LoadResult
    tier: str = ""
    checksum: bytes | None = None
    """The checksum that the tier verified; None unless `LOADED`."""


class Removal(NamedTuple):
    """The result of clearing a namespace."""

    pages: int
    """Number of copies deleted in all tiers."""
    complete: bool
    """False if pages may be left, because a tier was unreachable or calls were still in flight."""


class Warming(NamedTuple):
    """The result of warming: numbers of pages."""

    present: int = 0
    """Pages that were already on this node's disk."""
    copied: int = 0
    """Pages copied from the shared tier."""
    missing: int = 0
    """Pages that could not be loaded from the shared tier."""
    refused: int = 0
    """Pages that could not be stored, for lack of disk space."""
