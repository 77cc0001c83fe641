"""What a fault is, and what came of one."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from memkv_testbed.faults.cluster import Cluster


class Fault(NamedTuple):
    """Something that befalls a cluster under traffic, and its end."""

    name: str
    medium: Literal["minio", "bucket", "client", "nvme", "process"]
    inject: Callable[[Cluster], object]
    heal: Callable[[Cluster], object]
    after_flush: bool = False
    """Whether it strikes the disk's copies, so that every page reaches MinIO before and after."""
    destroys: bool = False
    """Whether MinIO's copies are as good as damaged, and set aside, so that pages may be gone."""


def leave_alone(cluster: Cluster) -> None:
    """Heal nothing: the agent and its clients cope by themselves."""


BUDGETS = 1.5
"""So many lookup budgets may the 99th percentile of a round's lookups last."""


class Outcome(NamedTuple):
    """What the clients of all nodes saw in one round."""

    fault: str
    calls: int
    hits: int
    """Pages that loads delivered, each compared byte for byte."""
    misses: int
    """Pages that loads of what had been acknowledged did not deliver."""
    wrong_pages: int
    acknowledged_pages: int
    acknowledged_pages_lost: int
    destroyed_pages: int
    """Acknowledged pages that went with the copies that the fault destroyed."""
    hung_calls: int
    """Calls beyond their limit, and calls that raised."""
    changed_pages: int
    """Pages that changed after the call that failed to load them had returned."""
    violations: Sequence[str]
    """Other broken rules, one line each: a foreign object removed, a bad request accepted, ..."""
    lookups: Sequence[float]
    """Seconds of each lookup."""
    slowest_move: float
    """Seconds of the slowest load or spill."""
    circuit_opened: float | None
    """Seconds from the fault until the circuit around MinIO was open; None if it stayed closed."""
    first_hit: float
    """Seconds from the fault's end until both nodes delivered a page again."""

    @property
    def lookup_p99(self) -> float:
        """Seconds."""
        return percentile(self.lookups, 0.99)


def percentile(seconds: Sequence[float], share: float) -> float:
    """Return what this share of the values stays under; 0 if there is none."""
    return sorted(seconds)[int(len(seconds) * share)] if seconds else 0.0
