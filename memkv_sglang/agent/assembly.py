"""Which tiers there are, and how an engine is made of them: the only place that knows."""

import logging
import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

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
    """Return an engine over the tiers that are configured; raises `ConfigError`.

    A disk that does not work is left out, if there is MinIO, until the next start.
    """
    if not config.nvme.directory and not config.minio.endpoint:
        raise ConfigError(
            "nvme.directory, minio.endpoint: both are empty, so there is no place for pages; set "
            "at least one of them"
        )
    metrics = Metrics(registry)
    left_out: dict[str, str] = {}
    nvme = _nvme(config, metrics, left_out) if config.nvme.directory else None
    try:
        minio = _minio(config, metrics, registry) if config.minio.endpoint else None
    except BaseException:
        if nvme is not None:
            nvme.close(time.monotonic())  # nothing was used
        raise
    uploads = minio is not None and config.minio.role == "writer"
    if nvme is not None and not uploads:
        _forget_waiting(nvme)
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
        left_out=left_out,
    )


def _forget_waiting(nvme: "NvmeTier") -> None:
    """Let pages leave that waited for an upload which this node no longer does."""
    waiting = [page.key for page in nvme.pending()]
    if waiting:
        nvme.mark_uploaded(waiting)
        log.warning("pages stay on this node alone", extra={"fields": {"pages": len(waiting)}})


# A tier that is not configured is not imported: the agent has half a second to start.


def _nvme(config: Config, metrics: Metrics, left_out: dict[str, str]) -> "NvmeTier | None":
    from memkv_sglang.tiers.nvme import NvmeTier

    try:
        return NvmeTier(config.nvme)
    except BrokenDiskError as error:
        if not config.minio.endpoint:
            raise
        metrics.errors.labels(NvmeTier.name, "open").inc()
        log.error("nvme left out", extra={"fields": {"reason": str(error)}})  # noqa: TRY400
        left_out[NvmeTier.name] = f"{error}. The agent tries again at its next start"
        return None


def _minio(config: Config, metrics: Metrics, registry: CollectorRegistry) -> "MinioTier":
    from memkv_sglang.tiers.minio import MinioTier

    tier = MinioTier(config.minio)
    registry.register(TierEvents(tier.name, tier.telemetry.counts))
    registry.register(BulkFallbacks(tier.telemetry.fallbacks))
    tier.keep_limits(config.collector, metrics)
    return tier
