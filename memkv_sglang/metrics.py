"""Every metric the agent exposes, by name, in one place."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Seconds; from an index lookup to the deadline of a batch."""


class Metrics:
    """The agent's metrics, registered in a registry of their own so that tests do not share them.

    `operation` is lookup, load or spill; `result` is a `LoadResult` or `SpillResult` in lower
    case. Corruption is `memkv_pages_total{operation="load",result="corrupt"}`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register everything in `registry`."""
        self.pages = Counter(
            "memkv_pages",
            "Pages by what became of them",
            ["tier", "operation", "result"],
            registry=registry,
        )
        self.bytes = Counter(
            "memkv_bytes",
            "Bytes of content moved",
            ["tier", "operation"],
            registry=registry,
        )
        self.seconds = Histogram(
            "memkv_call_seconds",
            "Time of a call to a tier",
            ["tier", "operation"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.errors = Counter(
            "memkv_call_errors",
            "Calls that a tier could not answer",
            ["tier", "operation"],
            registry=registry,
        )
        self.lookup_pages = Counter(
            "memkv_lookup_pages",
            "Pages of chains looked up, by whether they could be loaded",
            ["found"],
            registry=registry,
        )
        self.lookups_cut_short = Counter(
            "memkv_lookups_cut_short",
            "Lookups that ran out of time and answered a lower bound",
            registry=registry,
        )
        self.skipped_slow_pages = Counter(
            "memkv_declined_pages",
            "Pages that were there but would take longer to load than to compute",
            registry=registry,
        )
        self.merged_pages = Counter(
            "memkv_merged_pages",
            "Pages that were copied from an equal load in flight",
            registry=registry,
        )
        self.changed_pages = Counter(
            "memkv_changed_pages",
            "Copies discarded because a client changed the page while the agent read it",
            ["copied_for"],
            registry=registry,
        )
        self.uploads_dropped = Counter(
            "memkv_uploads_dropped_pages",
            "Pages that stay on this node alone",
            ["reason"],
            registry=registry,
        )
        self.promoted = Counter(
            "memkv_promoted_pages",
            "Pages copied from the shared tier to this node's disk, by result",
            ["result"],
            registry=registry,
        )
        self.queue_pages = Gauge(
            "memkv_upload_queue_pages", "Pages that wait for upload", registry=registry
        )
        self.queue_bytes = Gauge(
            "memkv_upload_queue_bytes", "Bytes that wait for upload", registry=registry
        )
        self.breaker = Gauge(
            "memkv_breaker_state",
            "Circuit breaker: 0 closed, 1 half-open, 2 open",
            ["tier"],
            registry=registry,
        )
        self.tier_works = Gauge(
            "memkv_tier_works",
            "Whether a tier works: 1, or 0 with the reason in `memkv stats`",
            ["tier"],
            registry=registry,
        )
        self.tier_pages = Gauge("memkv_tier_pages", "Pages held", ["tier"], registry=registry)
        self.tier_bytes = Gauge("memkv_tier_bytes", "Bytes held", ["tier"], registry=registry)
        self.evicted = Gauge(
            "memkv_tier_evicted_pages",
            "Pages removed to make room since the start",
            ["tier"],
            registry=registry,
        )
        self.collections = Counter(
            "memkv_collections",
            "Collections of the shared tier by this node, by result",
            ["result"],
            registry=registry,
        )
        self.collected_pages = Counter(
            "memkv_collected_pages",
            "Pages that this node removed from the shared tier to keep its limits",
            registry=registry,
        )
        self.collected_bytes = Counter(
            "memkv_collected_bytes", "Bytes of those pages", registry=registry
        )
        self.collection_seconds = Gauge(
            "memkv_collection_seconds",
            "How long this node's last collection took",
            registry=registry,
        )


class TierEvents(Collector):
    """What a tier counts itself, as `memkv_tier_events_total`: faults by kind, lookups' rounds, ...

    An event is there from the first time it happens.
    """

    def __init__(self, tier: str, counts: Callable[[], Mapping[str, int]]) -> None:
        """Read `counts`, by the event's name, whenever the metrics are read."""
        self._tier = tier
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the events that have happened."""
        family = CounterMetricFamily(
            "memkv_tier_events", "Faults and other events of a tier", labels=["tier", "event"]
        )
        for event, count in self._counts().items():
            family.add_metric([self._tier, event], count)
        yield family


class BulkFallbacks(Collector):
    """Pages that the MinIO tier's fast path left to the slow path, by reason."""

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Read `counts`, by reason, at each scrape."""
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counter, with all reasons."""
        family = CounterMetricFamily(
            "memkv_minio_bulk_fallbacks",
            "Pages that the compiled receive loop left to the slow path",
            labels=["reason"],
        )
        for reason, count in self._counts().items():
            family.add_metric([reason], count)
        yield family
