"""What a client knows of the other way to a page: computing it."""

from typing import NamedTuple


class Recompute(NamedTuple):
    """The price of computing a page, against which the engine holds the price of a load."""

    page_seconds: float
    """0 if not known: then every load pays."""
    page_bytes: int


UNKNOWN = Recompute(0.0, 0)
