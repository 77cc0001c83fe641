"""The metrics of the MinIO tier's shards. Without shards, the agent does not have them."""

from typing import Protocol

from prometheus_client import CollectorRegistry, Enum, Gauge, Histogram

from memkv_sglang.metrics.agent import BREAKER_STATES
from memkv_sglang.metrics.calls import CallMetrics

REQUEST_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class ShardState(Protocol):
    """The state that the gauges show; see `ShardStatus`."""

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
        self.calls = CallMetrics(registry, "shard", "memkv_shard", lookups=False)
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
            "Pages that a lookup asked shards about. Each costs at most one request",
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )

    def add_shard(self, shard: str) -> None:
        """Create the series of a shard, with value 0."""
        self.calls.initialize(shard)
        self.collection_last_success.labels(shard)

    def update(self, state: ShardState) -> None:
        """Set the gauges of a shard."""
        self.works.labels(state.name).set(state.problem == "")
        self.breaker_state.labels(state.name).state(state.breaker)
        self.stored_pages.labels(state.name).set(state.pages)
        self.stored_bytes.labels(state.name).set(state.bytes)
        if state.capacity is not None:
            self.capacity_bytes.labels(state.name).set(state.capacity)
