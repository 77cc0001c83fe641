"""Every metric that the agent exposes. `docs/metrics.md` is generated from this module."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from memkv_sglang import __version__
from memkv_sglang.tiers.base import LoadResult, SpillResult

CALL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Seconds, from an index lookup to the deadline of a batch."""

COLLECTION_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
"""Seconds, from a small bucket to one with millions of pages."""

BREAKER_STATES = ("closed", "half_open", "open")

_LOAD_RESULTS = tuple(result.name.lower() for result in LoadResult)
_SPILL_RESULTS = tuple(result.name.lower() for result in SpillResult)
RESULTS = {"lookup": ("found", "missing"), "load": _LOAD_RESULTS, "spill": _SPILL_RESULTS}
"""Every result that a page can have, by operation."""


class TotalsCounter(Collector):
    """A counter whose totals are kept elsewhere and copied here. Thread-safe."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._totals: dict[str, int] = {}
        registry.register(self)

    def set(self, tier: str, total: int) -> None:
        """Expose the tier's current total. Totals must never decrease."""
        self._totals[tier] = total

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the totals of all tiers."""
        family = CounterMetricFamily(self._name, self._documentation, labels=["tier"])
        for tier, total in list(self._totals.items()):
            family.add_metric([tier], total)
        yield family


RECORD_RESULTS = ("written", "dropped")


def make_records_counter(registry: CollectorRegistry) -> Counter:
    """Return the counter of the recorder (`[recorder]`), which only agents that record have."""
    counter = Counter(
        "memkv_recorded_lookups",
        "Lookups for the recorder, if `recorder.file` is set. Dropped: the disk was slow or full",
        ["result"],
        registry=registry,
    )
    for result in RECORD_RESULTS:
        counter.labels(result)
    return counter


class CallMetrics(Protocol):
    """Where calls are counted: by tier in `Metrics`, by shard in `ShardMetrics`."""

    pages: Counter
    bytes: Counter
    call_duration: Histogram
    call_errors: Counter

    def initialize_calls(self, tier: str) -> None:
        """Create the series of the calls, with value 0."""


class Metrics:
    """The agent's metrics. Each instance registers its own set in the given registry.

    Series whose labels are known in advance exist from the start, with value 0, so that rates and
    alerts work before the first event. `initialize_calls` adds the series of one tier.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register every metric. Raises `ValueError` if the registry has them already."""
        self.build = Info("memkv_build", "Version of the agent", registry=registry)
        self.build.info({"version": __version__})
        self.pages = Counter(
            "memkv_pages",
            "Pages processed by a tier, by operation and result",
            ["tier", "operation", "result"],
            registry=registry,
        )
        self.bytes = Counter(
            "memkv_bytes",
            "Page bytes loaded from or stored in a tier",
            ["tier", "operation"],
            registry=registry,
        )
        self.call_duration = Histogram(
            "memkv_call_duration_seconds",
            "Duration of calls to a tier. One call processes many pages",
            ["tier", "operation"],
            buckets=CALL_BUCKETS,
            registry=registry,
        )
        self.call_errors = Counter(
            "memkv_call_errors",
            "Calls to a tier that failed as a whole",
            ["tier", "operation"],
            registry=registry,
        )
        self.lookup_pages = Counter(
            "memkv_lookup_pages",
            "Pages that clients looked up, by whether any tier can load them",
            ["found"],
            registry=registry,
        )
        self.incomplete_lookups = Counter(
            "memkv_incomplete_lookups",
            "Lookups that ran out of time or met a failing tier, and returned a lower bound",
            registry=registry,
        )
        self.skipped_slow_pages = Counter(
            "memkv_skipped_slow_pages",
            "Pages found but not offered for loading, because recomputing them is faster",
            registry=registry,
        )
        self.saved_tokens = Counter(
            "memkv_saved_prefill_tokens",
            "Tokens that servers loaded instead of computing them",
            ["tier"],
            registry=registry,
        )
        self.saved_seconds = Counter(
            "memkv_saved_prefill_seconds",
            "Seconds that servers would have needed to compute these tokens, at their measured "
            "prefill speed. Loading time is not subtracted",
            ["tier"],
            registry=registry,
        )
        self.merged_pages = Counter(
            "memkv_merged_pages",
            "Pages copied from a concurrent load of the same page instead of from a tier",
            registry=registry,
        )
        self.changed_pages = Counter(
            "memkv_changed_pages",
            "Page copies discarded because the client changed the page while the agent read it",
            ["copied_for"],
            registry=registry,
        )
        self.upload_dropped_pages = Counter(
            "memkv_upload_dropped_pages",
            "Pages dropped from the upload queue; the shared tier will not get them",
            ["reason"],
            registry=registry,
        )
        self.promotion_pages = Counter(
            "memkv_promotion_pages",
            "Pages to be copied from the shared tier to this node's disk, by result",
            ["result"],
            registry=registry,
        )
        self.upload_queue_pages = Gauge(
            "memkv_upload_queue_pages", "Pages waiting for upload", registry=registry
        )
        self.upload_queue_bytes = Gauge(
            "memkv_upload_queue_bytes", "Page bytes waiting for upload", registry=registry
        )
        self.upload_queue_capacity_bytes = Gauge(
            "memkv_upload_queue_capacity_bytes",
            "Limit of the upload queue (engine.upload_backlog); 0 if this node does not upload",
            registry=registry,
        )
        self.upload_queue_age = Gauge(
            "memkv_upload_queue_age_seconds",
            "How long the oldest page in the upload queue has been waiting, counted from the "
            "agent's start at the earliest; 0 if the queue is empty",
            registry=registry,
        )
        self.upload_deferred_bytes = Gauge(
            "memkv_upload_deferred_bytes",
            "Page bytes on this disk that are uploaded when it fills (engine.upload)",
            registry=registry,
        )
        self.breaker_state = Enum(
            "memkv_breaker_state",
            "Circuit breaker of a tier: 1 for the current state, 0 for the others",
            ["tier"],
            states=list(BREAKER_STATES),
            registry=registry,
        )
        self.tier_works = Gauge(
            "memkv_tier_works",
            "1 if the tier works, otherwise 0; `memkv stats` shows the reason",
            ["tier"],
            registry=registry,
        )
        self.tier_pages = Gauge(
            "memkv_tier_pages",
            "Pages stored in a tier; 0 for MinIO, whose pages no node counts",
            ["tier"],
            registry=registry,
        )
        self.tier_bytes = Gauge(
            "memkv_tier_bytes",
            "Bytes used by a tier; 0 for MinIO, whose bytes no node counts",
            ["tier"],
            registry=registry,
        )
        self.tier_capacity_bytes = Gauge(
            "memkv_tier_capacity_bytes",
            "Capacity of a tier; absent if the tier has no limit of its own",
            ["tier"],
            registry=registry,
        )
        self.tier_evicted_pages = TotalsCounter(
            "memkv_tier_evicted_pages", "Pages evicted from a tier to free space", registry
        )
        self.disk_works = Gauge(
            "memkv_disk_works",
            "1 if the disk of a directory works, otherwise 0; `memkv stats` shows the reason",
            ["directory"],
            registry=registry,
        )
        self.disk_pages = Gauge(
            "memkv_disk_pages",
            "Pages stored in a directory (nvme.directory)",
            ["directory"],
            registry=registry,
        )
        self.disk_bytes = Gauge(
            "memkv_disk_bytes", "Bytes used in a directory", ["directory"], registry=registry
        )
        self.disk_capacity_bytes = Gauge(
            "memkv_disk_capacity_bytes",
            "Capacity of a directory (nvme.capacity)",
            ["directory"],
            registry=registry,
        )
        self.collections = Counter(
            "memkv_collections",
            "Rounds of collection that this node began, by result",
            ["result"],
            registry=registry,
        )
        self.collected_pages = Counter(
            "memkv_collected_pages",
            "Pages that this node deleted from the shared tier to enforce its limits",
            registry=registry,
        )
        self.collected_bytes = Counter(
            "memkv_collected_bytes",
            "Page bytes that this node deleted from the shared tier to enforce its limits",
            registry=registry,
        )
        self.collection_memory_bytes = Gauge(
            "memkv_collection_memory_bytes",
            "Most memory that this node's collections used for index entries and logs at once",
            registry=registry,
        )
        self.collection_duration = Histogram(
            "memkv_collection_duration_seconds",
            "Duration of this node's successful collections",
            buckets=COLLECTION_BUCKETS,
            registry=registry,
        )
        self.collection_last_success = Gauge(
            "memkv_collection_last_success_timestamp_seconds",
            "Unix time of this node's last successful collection; 0 before the first. "
            "Nodes share the work, so take the maximum over all nodes",
            registry=registry,
        )
        self._initialize()

    def _initialize(self) -> None:
        for found in ("yes", "no"):
            self.lookup_pages.labels(found)
        for purpose in ("promotion", "equal_load"):
            self.changed_pages.labels(purpose)
        for reason in ("backlog", "evicted", "failed"):
            self.upload_dropped_pages.labels(reason)
        for result in ("changed", "no_space", *_SPILL_RESULTS):
            self.promotion_pages.labels(result)
        for result in ("done", "failed"):
            self.collections.labels(result)

    def initialize_calls(self, tier: str) -> None:
        """Create the series of a tier's calls, with value 0."""
        for operation, results in RESULTS.items():
            for result in results:
                self.pages.labels(tier, operation, result)
            self.call_duration.labels(tier, operation)
            self.call_errors.labels(tier, operation)
        for operation in ("load", "spill"):
            self.bytes.labels(tier, operation)
        self.saved_tokens.labels(tier)
        self.saved_seconds.labels(tier)


class TierEvents(Collector):
    """Exposes a tier's own event counts as `memkv_tier_events_total`.

    A series exists from the first occurrence of its event.
    """

    NAME = "memkv_tier_events"
    HELP = "Faults and other events inside a tier; a series appears with its first event"

    def __init__(self, tier: str, counts: Callable[[], Mapping[str, int]]) -> None:
        """Call `counts`, which returns totals by event, at each scrape."""
        self._tier = tier
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the totals of all events so far."""
        family = CounterMetricFamily(self.NAME, self.HELP, labels=["tier", "event"])
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
