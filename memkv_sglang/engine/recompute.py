"""The cost of recomputing a page, as a client knows it."""

from typing import NamedTuple


class Recompute(NamedTuple):
    """The cost of recomputing a page, which the engine compares to the cost of loading it."""

    page_seconds: float
    """0 if unknown; then all pages are loaded."""
    page_bytes: int


UNKNOWN = Recompute(0.0, 0)
