"""Metrics of calls to tiers, or to the shards of a tier."""

from collections.abc import Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from memkv_sglang.tiers.base import LoadResult, SpillResult

CALL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds in seconds, from a search of the index in memory to the deadline of a load."""

SPILL_RESULTS = tuple(result.name.lower() for result in SpillResult)
_TRANSFERS: Mapping[str, Sequence[str]] = {
    "load": tuple(result.name.lower() for result in LoadResult),
    "spill": SPILL_RESULTS,
}
_WITH_LOOKUPS = {"lookup": ("found", "missing"), **_TRANSFERS}


class CallMetrics:
    """Pages, bytes, duration and failures of calls, by operation, for each tier or shard."""

    def __init__(
        self, registry: CollectorRegistry, label: str, prefix: str, *, lookups: bool
    ) -> None:
        """Register the metrics.

        Args:
            registry: the registry.
            label: what is called: `tier` or `shard`.
            prefix: beginning of the metrics' names.
            lookups: whether lookups are counted, in addition to loads and spills.

        """
        self._results = _WITH_LOOKUPS if lookups else _TRANSFERS
        self.pages = Counter(
            f"{prefix}_pages",
            f"Pages that calls to a {label} processed, by operation and result",
            [label, "operation", "result"],
            registry=registry,
        )
        self.bytes = Counter(
            f"{prefix}_bytes",
            f"Page bytes loaded from or stored in a {label}",
            [label, "operation"],
            registry=registry,
        )
        self.duration = Histogram(
            f"{prefix}_call_duration_seconds",
            f"Duration of calls to a {label}. A call processes many pages",
            [label, "operation"],
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self.errors = Counter(
            f"{prefix}_call_errors",
            f"Calls to a {label} that failed as a whole",
            [label, "operation"],
            registry=registry,
        )

    def initialize(self, name: str) -> None:
        """Create the series of a tier or shard, with value 0."""
        for operation, results in self._results.items():
            for result in results:
                self.pages.labels(name, operation, result)
            self.duration.labels(name, operation)
            self.errors.labels(name, operation)
        for operation in _TRANSFERS:
            self.bytes.labels(name, operation)
