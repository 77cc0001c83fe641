"""Metrics of the shards of the MinIO tier; absent if no shards are configured."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from memkv_sglang.metrics import BREAKER_STATES, CALL_BUCKETS, RESULTS

REQUEST_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ShardState(Protocol):
    """What the gauges show; see `ShardStatus`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def problem(self) -> str | None: ...  # noqa: D102

    @property
    def breaker(self) -> str: ...  # noqa: D102

    @property
    def pages(self) -> int: ...  # noqa: D102

    @property
    def bytes(self) -> int: ...  # noqa: D102

    @property
    def capacity(self) -> int | None: ...  # noqa: D102


class ShardMetrics:
    """Calls and state by shard. The tier's metrics are sums over all shards."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register every metric."""
        self.pages = Counter(
            "memkv_shard_pages",
            "Pages loaded from or stored in a shard, by result",
            ["shard", "operation", "result"],
            registry=registry,
        )
        self.bytes = Counter(
            "memkv_shard_bytes",
            "Page bytes loaded from or stored in a shard",
            ["shard", "operation"],
            registry=registry,
        )
        self.call_duration = Histogram(
            "memkv_shard_call_duration_seconds",
            "Duration of loads from and spills to a shard",
            ["shard", "operation"],
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self.call_errors = Counter(
            "memkv_shard_call_errors",
            "Calls to a shard that failed as a whole",
            ["shard", "operation"],
            registry=registry,
        )
        self.works = Gauge(
            "memkv_shard_works",
            "1 if the shard works, otherwise 0; `memkv stats` shows the reason",
            ["shard"],
            registry=registry,
        )
        self.breaker_state = Enum(
            "memkv_shard_breaker_state",
            "Circuit breaker of a shard: 1 for the current state, 0 for the others",
            ["shard"],
            states=list(BREAKER_STATES),
            registry=registry,
        )
        self.stored_pages = Gauge(
            "memkv_shard_stored_pages",
            "Pages in a shard when it was last collected",
            ["shard"],
            registry=registry,
        )
        self.stored_bytes = Gauge(
            "memkv_shard_stored_bytes",
            "Page bytes in a shard when it was last collected",
            ["shard"],
            registry=registry,
        )
        self.capacity_bytes = Gauge(
            "memkv_shard_capacity_bytes",
            "Capacity of a shard; absent if it has no limit",
            ["shard"],
            registry=registry,
        )
        self.collection_last_success = Gauge(
            "memkv_shard_collection_last_success_timestamp_seconds",
            "Unix time of this node's last successful collection of a shard; 0 before the first",
            ["shard"],
            registry=registry,
        )
        self.lookup_requests = Histogram(
            "memkv_shard_lookup_requests",
            "Pages that a lookup asked shards about; each costs at most one request",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )

    def initialize_calls(self, shard: str) -> None:
        """Create the series of a shard, with value 0."""
        for operation in ("load", "spill"):
            for result in RESULTS[operation]:
                self.pages.labels(shard, operation, result)
            self.call_duration.labels(shard, operation)
            self.call_errors.labels(shard, operation)
            self.bytes.labels(shard, operation)
        self.collection_last_success.labels(shard)

    def update(self, state: ShardState) -> None:
        """Set the gauges of a shard."""
        self.works.labels(state.name).set(state.problem == "")
        self.breaker_state.labels(state.name).state(state.breaker)
        self.stored_pages.labels(state.name).set(state.pages)
        self.stored_bytes.labels(state.name).set(state.bytes)
        if state.capacity is not None:
            self.capacity_bytes.labels(state.name).set(state.capacity)


class ShardEvents(Collector):
    """Exposes the shards' own event counts as `memkv_shard_events_total`."""

    def __init__(self, counts: Mapping[str, Callable[[], Mapping[str, int]]]) -> None:
        """Call each shard's function, which returns totals by event, at each scrape."""
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the totals of all events so far."""
        family = CounterMetricFamily(
            "memkv_shard_events",
            "Faults and other events inside a shard; a series appears with its first event",
            labels=["shard", "event"],
        )
        for shard, counts in self._counts.items():
            for event, count in counts().items():
                family.add_metric([shard, event], count)
        yield family
