"""Build the engine from the configured tiers."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry

from memkv_sglang.agent.paths import socket_path
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.schema import Config, MinioConfig
from memkv_sglang.config.shards import has_minio, shard_configs
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.pins import PinWatcher
from memkv_sglang.engine.shards import GuardedShard, guard_shard
from memkv_sglang.metrics import Metrics, ShardMetrics
from memkv_sglang.metrics.totals import bulk_fallbacks, shard_events, tier_events

if TYPE_CHECKING:
    from memkv_sglang.tiers.disks import StripedTier
    from memkv_sglang.tiers.minio import MinioTier
    from memkv_sglang.tiers.nvme import NvmeTier
    from memkv_sglang.tiers.shards import ShardedTier

log = logging.getLogger(__name__)


def build_engine(config: Config, registry: CollectorRegistry) -> Engine:
    """Return an engine with the configured tiers. Raises `ConfigError`.

    Broken disks are retried in the background, unless there is no other disk and no MinIO.
    """
    if not config.nvme.directory and not has_minio(config.minio):
        raise ConfigError(
            "nvme.directory, minio.endpoint: both are empty, so pages cannot be stored; set at "
            "least one of them"
        )
    metrics = Metrics(registry)
    nvme = _nvme(config, metrics) if config.nvme.directory else None
    shards: list[GuardedShard] = []
    try:
        minio = _minio(config, metrics, registry, shards) if has_minio(config.minio) else None
    except BaseException:
        if nvme is not None:
            nvme.close(time.monotonic())  # no call can be in flight yet
        raise
    uploads = minio is not None and config.minio.role == "writer"
    if nvme is not None and not uploads:
        _cancel_uploads(nvme)
    marks = nvme if uploads else None
    watcher = PinWatcher(minio, nvme) if minio is not None and nvme is not None else None
    return Engine(
        nvme,
        minio,
        marks,
        config.engine,
        metrics,
        uses=minio,
        watcher=watcher,
        shards=shards,
    )


def _cancel_uploads(nvme: "NvmeTier | StripedTier") -> None:
    """Cancel the uploads that an earlier run left pending, so that their pages can be evicted."""
    waiting = [page.key for page in nvme.pending()]
    if waiting:
        nvme.mark_uploaded(waiting)
        log.warning(
            "pending uploads cancelled, pages stay on this node only",
            extra={"fields": {"pages": len(waiting)}},
        )


# Tiers are imported only if configured, because the agent must start within half a second.


def _nvme(config: Config, metrics: Metrics) -> "NvmeTier | StripedTier":
    from memkv_sglang.tiers.nvme import NvmeTier

    if len(config.nvme.for_each_directory()) == 1:
        try:
            return NvmeTier(config.nvme)
        except BrokenDiskError:
            if not has_minio(config.minio):
                raise
    from memkv_sglang.tiers.disks import StripedTier

    tier = StripedTier(config.nvme)
    broken = [disk.problem for disk in tier.disks() if disk.problem]
    metrics.calls.errors.labels(tier.name, "open").inc(len(broken))
    if len(broken) == len(tier.disks()) and not has_minio(config.minio):
        tier.close()
        raise BrokenDiskError(broken[0])
    return tier


def _minio(
    config: Config, metrics: Metrics, registry: CollectorRegistry, guarded: list[GuardedShard]
) -> "MinioTier | ShardedTier":
    """Return the tier of one bucket, or the sharded tier; add the shards to `guarded`."""
    tiers: dict[str, MinioTier] = {}
    configs = shard_configs(_with_split_cache(config.minio))
    shard_metrics = ShardMetrics(registry) if config.minio.shards else None
    try:
        for name, one in configs.items():
            tiers[name] = _bucket_tier(one, config, metrics, name, shard_metrics)
    except BaseException:
        for tier in tiers.values():
            tier.close(time.monotonic())
        raise
    counters = [tier.telemetry for tier in tiers.values()]
    registry.register(tier_events("minio", lambda: _total(one.counts() for one in counters)))
    registry.register(bulk_fallbacks(lambda: _total(one.fallbacks() for one in counters)))
    if shard_metrics is None:
        return tiers[""]
    from memkv_sglang.tiers.shards import Shard, ShardedTier

    registry.register(shard_events({name: one.telemetry.counts for name, one in tiers.items()}))
    shards = []
    for name, tier in tiers.items():
        shard = guard_shard(name, tier, config.engine, shard_metrics)
        guarded.append(shard)
        shards.append(Shard(name, shard.tier, shard.works, tier, tier, tier.round_trip))
    return ShardedTier(
        "minio",
        shards,
        replicas=config.minio.replicas,
        presence_cache_pages=config.minio.presence_cache_pages // 2,
        negative_ttl=config.minio.negative_ttl,
        report=shard_metrics.lookup_requests.observe,
    )


def _with_split_cache(config: MinioConfig) -> MinioConfig:
    """Return settings in which each shard has its part of the presence cache.

    Half of the cache is split among the shards: each remembers which pages it has. The other half
    remembers which pages any shard has; see `ShardedTier`.
    """
    if not config.shards:
        return config
    pages = config.presence_cache_pages // (2 * len(config.shards))
    return msgspec.structs.replace(config, presence_cache_pages=pages)


def _bucket_tier(
    minio: MinioConfig,
    config: Config,
    metrics: Metrics,
    shard: str,
    shard_metrics: ShardMetrics | None,
) -> "MinioTier":
    from memkv_sglang.tiers.minio import MinioTier

    bucket = f"{minio.endpoint} {minio.bucket} {minio.prefix}"
    name = f"cleared-{hashlib.sha256(bucket.encode()).hexdigest()[:16]}.json"
    tier = MinioTier(minio, socket_path(config.agent).with_name(name))
    if shard_metrics is None:
        tier.keep_limits(config.collector, metrics)
    else:
        collected = shard_metrics.collection_last_success.labels(shard)
        tier.keep_limits(config.collector, metrics, collected.set_to_current_time)
    return tier


def _total(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)  # adding with `+` would drop events whose count is 0
    return total
