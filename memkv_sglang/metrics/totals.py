"""Counters whose totals are kept by other code, such as a tier that knows nothing of metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

Totals = Mapping[tuple[str, ...], int]
"""Totals by the values of the labels. They must never decrease."""


class TotalsCounter(Collector):
    """A counter that reads its totals at each scrape. Thread-safe if `read` is."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], read: Callable[[], Totals]
    ) -> None:
        """Expose the totals that `read` returns."""
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._read = read

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counter with all its series."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, total in self._read().items():
            family.add_metric(values, total)
        yield family


Counts = Callable[[], Mapping[str, int]]
"""Returns totals by event or reason."""


def tier_events(tier: str, counts: Counts) -> TotalsCounter:
    """Return the counter of a tier's events."""
    return TotalsCounter(
        "memkv_tier_events",
        "Faults and other events inside a tier. A series appears with its first event",
        ["tier", "event"],
        lambda: {(tier, event): count for event, count in counts().items()},
    )


def shard_events(counts: Mapping[str, Counts]) -> TotalsCounter:
    """Return the counter of events inside shards. `counts` has one function per shard."""
    return TotalsCounter(
        "memkv_shard_events",
        "Faults and other events inside a shard. A series appears with its first event",
        ["shard", "event"],
        lambda: {
            (shard, event): count
            for shard, read in counts.items()
            for event, count in read().items()
        },
    )


def bulk_fallbacks(counts: Counts) -> TotalsCounter:
    """Return the counter of pages that the MinIO tier's fast path left to the slow path."""
    return TotalsCounter(
        "memkv_minio_bulk_fallbacks",
        "Pages that the compiled fast path left to the slow path, by reason",
        ["reason"],
        lambda: {(reason,): count for reason, count in counts().items()},
    )
