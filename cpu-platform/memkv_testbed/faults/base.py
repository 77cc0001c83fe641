"""A fault, and the outcome of a round with it."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from memkv_testbed.faults.cluster import Cluster


class Fault(NamedTuple):
    """A fault that strikes a cluster under traffic."""

    name: str
    medium: Literal["minio", "bucket", "client", "nvme", "process"]
    inject: Callable[[Cluster], object]
    heal: Callable[[Cluster], object]
    after_flush: bool = False
    """Whether the fault damages copies on the disk, so that MinIO must have every page before and
    after."""
    destroys: bool = False
    """Whether MinIO's copies look damaged and are quarantined, so that pages may be lost."""


def leave_alone(cluster: Cluster) -> None:
    """Heal nothing, because the agent and its clients recover by themselves."""


BUDGETS = 1.5
"""Limit of the 99th percentile of a round's lookup times, relative to the lookup budget."""


class Outcome(NamedTuple):
    """What the clients of all nodes saw in one round."""

    fault: str
    calls: int
    hits: int
    """Number of pages that were loaded. Each was compared byte by byte."""
    misses: int
    """Acknowledged pages that a load did not deliver."""
    wrong_pages: int
    acknowledged_pages: int
    acknowledged_pages_lost: int
    destroyed_pages: int
    """Acknowledged pages whose only copy the fault destroyed."""
    hung_calls: int
    """Number of calls that exceeded their limit or raised."""
    changed_pages: int
    """Pages that changed after the load that failed to fill them had returned."""
    violations: Sequence[str]
    """Other broken rules, one line each: a foreign object removed, a bad request accepted, ..."""
    lookups: Sequence[float]
    """Seconds of each lookup."""
    slowest_move: float
    """Seconds of the slowest load or spill."""
    circuit_opened: float | None
    """Seconds from the fault until MinIO's circuit opened; None if it stayed closed."""
    first_hit: float
    """Seconds from the end of the fault until both nodes loaded a page again."""

    @property
    def lookup_p99(self) -> float:
        """The 99th percentile of the lookups, in seconds."""
        return percentile(self.lookups, 0.99)


def percentile(seconds: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed; 0 if there are none."""
    return sorted(seconds)[int(len(seconds) * share)] if seconds else 0.0
