"""The cost of recomputing a page, as a client knows it."""

from typing import NamedTuple


class Recompute(NamedTuple):
    """The cost of recomputing a page. The engine compares it to the cost of loading the page."""

    page_seconds: float
    """Seconds to recompute a page. If it is unknown, 0, and all pages are loaded."""
    page_bytes: int


UNKNOWN = Recompute(0.0, 0)
