"""The engine's state, as sent in status messages."""

import msgspec

from memkv_sglang.tiers.base import DiskStatus


class TierStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of a tier, as far as it is known without I/O."""

    name: str
    problem: str | None
    """Why the tier does not work; empty if it works; None if that is not known yet."""
    pages: int
    bytes: int
    capacity: int | None
    """Capacity in bytes; None if the tier has no limit of its own."""
    evicted: int
    """Number of pages evicted since the start."""
    disks: list[DiskStatus] = []
    """State of this node's disks; empty for a shared tier."""


class ShardStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of a shard of the shared tier, as far as it is known without I/O; see `TierStatus`."""

    name: str
    problem: str | None
    breaker: str
    """State of the circuit breaker: `closed`, `half_open` or `open`."""
    pages: int
    bytes: int
    capacity: int | None
    evicted: int


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """State of the engine."""

    tiers: list[TierStatus]
    """Nearest first."""
    queue_pages: int
    queue_bytes: int
    breaker: str
    """State of the circuit breaker: `closed`, `half_open` or `open`; `none` without a shared tier.
    With shards, it is the state of the best breaker."""
    shards: list[ShardStatus] = []
    """Shards of the shared tier, if it has any."""
