"""Build the engine from the configured tiers."""

import hashlib
import logging
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from memkv_sglang.agent.paths import socket_path
from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.pins import PinWatcher
from memkv_sglang.metrics import BulkFallbacks, Metrics, TierEvents

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio import MinioTier
    from memkv_sglang.tiers.nvme import NvmeTier

log = logging.getLogger(__name__)


def build_engine(config: Config, registry: CollectorRegistry) -> Engine:
    """Return an engine with the configured tiers. Raises `ConfigError`.

    If MinIO is configured, a broken disk is left out until the next start.
    """
    if not config.nvme.directory and not config.minio.endpoint:
        raise ConfigError(
            "nvme.directory, minio.endpoint: both are empty, so pages cannot be stored; set at "
            "least one of them"
        )
    metrics = Metrics(registry)
    disabled: dict[str, str] = {}
    nvme = _nvme(config, metrics, disabled) if config.nvme.directory else None
    try:
        minio = _minio(config, metrics, registry) if config.minio.endpoint else None
    except BaseException:
        if nvme is not None:
            nvme.close(time.monotonic())  # no calls to wait for
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
        disabled=disabled,
    )


def _cancel_uploads(nvme: "NvmeTier") -> None:
    """Let pages be evicted that an earlier run marked for upload; this node no longer uploads."""
    waiting = [page.key for page in nvme.pending()]
    if waiting:
        nvme.mark_uploaded(waiting)
        log.warning(
            "pending uploads cancelled, pages stay on this node only",
            extra={"fields": {"pages": len(waiting)}},
        )


# Tiers are imported only if configured, because the agent must start within half a second.


def _nvme(config: Config, metrics: Metrics, disabled: dict[str, str]) -> "NvmeTier | None":
    from memkv_sglang.tiers.nvme import NvmeTier

    try:
        return NvmeTier(config.nvme)
    except BrokenDiskError as error:
        if not config.minio.endpoint:
            raise
        metrics.call_errors.labels(NvmeTier.name, "open").inc()
        log.error("nvme tier disabled", extra={"fields": {"reason": str(error)}})  # noqa: TRY400
        disabled[NvmeTier.name] = f"{error}. The agent tries again when it restarts"
        return None


def _minio(config: Config, metrics: Metrics, registry: CollectorRegistry) -> "MinioTier":
    from memkv_sglang.tiers.minio import MinioTier

    bucket = f"{config.minio.endpoint} {config.minio.bucket} {config.minio.prefix}"
    name = f"cleared-{hashlib.sha256(bucket.encode()).hexdigest()[:16]}.json"
    tier = MinioTier(config.minio, socket_path(config.agent).with_name(name))
    registry.register(TierEvents(tier.name, tier.telemetry.counts))
    registry.register(BulkFallbacks(tier.telemetry.fallbacks))
    tier.keep_limits(config.collector, metrics)
    return tier
