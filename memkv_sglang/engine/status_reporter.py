"""Collect the engine's state for status messages and the metrics' gauges."""

from collections.abc import Sequence

from memkv_sglang.engine.breaker import Breaker
from memkv_sglang.engine.shards import GuardedShard
from memkv_sglang.engine.status import EngineStatus, TierStatus
from memkv_sglang.engine.uploads import UploadQueue
from memkv_sglang.metrics import Metrics
from memkv_sglang.tiers.base import Tier


class StatusReporter:
    """Reports the state of the tiers, the upload queue and the circuit breaker. Thread-safe."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        breaker: Breaker | None,
        uploads: UploadQueue | None,
        metrics: Metrics,
        shards: Sequence[GuardedShard] = (),
    ) -> None:
        """Report the `tiers`, nearest first.

        `breaker` and `shards` are those of the shared tier, which is the last one. Without a shared
        tier, `breaker` is None.
        """
        self._shards = shards
        self._tiers = tiers
        self._breaker = breaker
        self._uploads = uploads
        self._metrics = metrics

    def report(self) -> EngineStatus:
        """Return the current state, and update the gauges. Does no I/O."""
        statuses = [_tier_status(tier) for tier in self._tiers]
        for status in statuses:
            self._update_gauges(status)
        if self._uploads is not None:
            self._metrics.upload_queue_age.set(self._uploads.age)
        breaker = "none"
        if self._breaker is not None:
            breaker = self._breaker.state.value
            self._metrics.breaker_state.labels(self._tiers[-1].name).state(breaker)
        return EngineStatus(
            tiers=statuses,
            queue_pages=self._uploads.pages if self._uploads else 0,
            queue_bytes=self._uploads.bytes if self._uploads else 0,
            breaker=breaker,
            shards=[shard.status() for shard in self._shards],
        )

    def _update_gauges(self, status: TierStatus) -> None:
        self._metrics.tier_works.labels(status.name).set(status.problem == "")
        self._metrics.tier_pages.labels(status.name).set(status.pages)
        self._metrics.tier_bytes.labels(status.name).set(status.bytes)
        self._metrics.tier_evicted_pages[status.name,] = status.evicted
        if status.capacity is not None:
            self._metrics.tier_capacity_bytes.labels(status.name).set(status.capacity)
        for disk in status.disks:
            self._metrics.disk_works.labels(disk.directory).set(disk.problem == "")
            self._metrics.disk_pages.labels(disk.directory).set(disk.usage.pages)
            self._metrics.disk_bytes.labels(disk.directory).set(disk.usage.bytes)
            self._metrics.disk_capacity_bytes.labels(disk.directory).set(disk.usage.capacity or 0)


def _tier_status(tier: Tier) -> TierStatus:
    usage = tier.usage()
    return TierStatus(
        name=tier.name,
        problem=tier.problem(),
        pages=usage.pages,
        bytes=usage.bytes,
        capacity=usage.capacity,
        evicted=usage.evicted,
        disks=tier.disks(),
    )
