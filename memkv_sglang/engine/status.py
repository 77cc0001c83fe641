"""What the engine tells about itself; travels in messages as it is."""

import msgspec


class TierStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier holds, as it knows without asking anyone."""

    name: str
    problem: str | None
    """Why it does not work; empty while it does, None until that is known."""
    pages: int
    bytes: int
    capacity: int | None
    """Bytes; None where the tier has no bound of its own."""
    evicted: int
    """Pages removed to make room since the start."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The engine at one moment."""

    tiers: list[TierStatus]
    """Nearest first."""
    queue_pages: int
    queue_bytes: int
    breaker: str
    """`closed`, `half_open` or `open`; `none` without a shared tier."""
