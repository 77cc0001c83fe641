"""The metrics of an agent, except those of its shards."""

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info

from memkv_sglang import __version__
from memkv_sglang.metrics.calls import SPILL_RESULTS, CallMetrics
from memkv_sglang.metrics.totals import TotalsCounter

COLLECTION_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)
"""Upper bounds in seconds, from a small bucket to one with millions of pages."""

BREAKER_STATES = ("closed", "half_open", "open")

RECORD_RESULTS = ("written", "dropped")


def make_records_counter(registry: CollectorRegistry) -> Counter:
    """Return the counter of the recorder. Agents without a recorder do not have it."""
    counter = Counter(
        "memkv_recorded_lookups",
        "Lookups for the recorder (recorder.file), by result: written, or dropped because the disk "
        "was slow or full",
        ["result"],
        registry=registry,
    )
    for result in RECORD_RESULTS:
        counter.labels(result)
    return counter


class Metrics:
    """The agent's metrics. Each instance registers its own set in the given registry.

    Series whose labels are known in advance exist from the start, with value 0, so that rates and
    alerts work before the first event. `add_tier` adds those of a tier.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register every metric. Raises `ValueError` if the registry has them already."""
        self.build = Info("memkv_build", "Version of the agent", registry=registry)
        self.build.info({"version": __version__})
        self.calls = CallMetrics(registry, "tier", "memkv", lookups=True)
        self.lookup_pages = Counter(
            "memkv_lookup_pages",
            "Pages that clients looked up, by whether any tier can load them",
            ["found"],
            registry=registry,
        )
        self.incomplete_lookups = Counter(
            "memkv_incomplete_lookups",
            "Lookups that may have missed pages, because they ran out of time or a tier failed",
            registry=registry,
        )
        self.skipped_slow_pages = Counter(
            "memkv_skipped_slow_pages",
            "Pages that lookups found but left out, because recomputing them is faster",
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
            "Seconds that servers would have needed to compute the loaded tokens, at their "
            "measured prefill speed. Loading time is not subtracted",
            ["tier"],
            registry=registry,
        )
        self.merged_pages = Counter(
            "memkv_merged_pages",
            "Pages copied from a concurrent load of the same page instead of loaded from a tier",
            registry=registry,
        )
        self.balanced_pages = Counter(
            "memkv_balanced_pages",
            "Pages on this node's disk that were loaded from the shared tier, because both tiers "
            "together are faster (engine.balance_loads)",
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
            "Pages not uploaded, by reason: the upload queue was full or lacked an ancestor "
            "(backlog), every attempt failed (failed), or the disk had no valid copy left "
            "(evicted). A page that is spilled again is queued again, and may be counted again",
            ["reason"],
            registry=registry,
        )
        self.promotion_pages = Counter(
            "memkv_promotion_pages",
            "Pages chosen to be copied from the shared tier to this node's disk, by result",
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
            "How long the oldest page in the upload queue has waited since it was queued or the "
            "agent started; 0 if the queue is empty",
            registry=registry,
        )
        self.upload_deferred_bytes = Gauge(
            "memkv_upload_deferred_bytes",
            "Page bytes on the disk that are uploaded only when it fills up (engine.upload)",
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
        self.tier_evicted_pages: dict[tuple[str, ...], int] = {}
        """Pages evicted by each tier so far."""
        registry.register(
            TotalsCounter(
                "memkv_tier_evicted_pages",
                "Pages evicted from a tier to free space",
                ["tier"],
                self.tier_evicted_pages.copy,
            )
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
            "Collections that this node began, by result",
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
            "Peak memory of this node's collections for index entries and logs",
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
        for result in ("changed", "no_space", *SPILL_RESULTS):
            self.promotion_pages.labels(result)
        for result in ("done", "failed"):
            self.collections.labels(result)

    def add_tier(self, tier: str) -> None:
        """Create a tier's series with value 0: calls, and tokens and seconds saved by loads."""
        self.calls.initialize(tier)
        self.saved_tokens.labels(tier)
        self.saved_seconds.labels(tier)
