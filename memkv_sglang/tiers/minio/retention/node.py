"""One node's part in the retention of a bucket: its log, its pins and its collector."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import msgspec

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import TierUsage
from memkv_sglang.tiers.minio.http import ServerClock
from memkv_sglang.tiers.minio.objects import ObjectClient, Telemetry
from memkv_sglang.tiers.minio.probe import Conditions, ServerSupport
from memkv_sglang.tiers.minio.retention.bucket_format import BucketFormat, write_format
from memkv_sglang.tiers.minio.retention.collector import Collector
from memkv_sglang.tiers.minio.retention.logs import LogStore
from memkv_sglang.tiers.minio.retention.parts import ControlPath, Parts
from memkv_sglang.tiers.minio.retention.pins import KeptPages, PinStore
from memkv_sglang.tiers.minio.retention.rebuild import Rebuilder
from memkv_sglang.tiers.minio.retention.renewal import Renewer
from memkv_sglang.tiers.minio.retention.use_log import LogTarget, UseLog
from memkv_sglang.tiers.minio.retention.worker import CollectorWorker

log = logging.getLogger(__name__)

FLUSH_TIME = 60.0
"""Maximum seconds to write this node's log before pages are removed."""


class OpenPath(NamedTuple):
    """The control path of an open bucket."""

    control: ControlPath
    client: ObjectClient
    """For small requests."""
    format: BucketFormat


class Access(Protocol):
    """Access to a bucket. Calls block, and raise `TierError`."""

    def path(self) -> OpenPath:
        """Wait until the bucket is open; return its control path."""

    def measured_support(self) -> ServerSupport:
        """Return what the server supports. Measure it if necessary."""

    def demand_writer(self) -> None:
        """Raise `TierError` if this node only reads."""


class NodeRetention:
    """Logs what one node stores and uses, and lets it take part in collections.

    Calls block while the bucket is not open, and raise `TierError`. A reader logs nothing.
    """

    def __init__(
        self,
        access: Access,
        bucket: str,
        clock: ServerClock,
        telemetry: Telemetry,
        forget: Callable[[Sequence[PageKey]], None],
    ) -> None:
        """Start nothing. `forget` is called with pages that a collection has removed."""
        self._access = access
        self._bucket = bucket
        self._telemetry = telemetry
        self._forget = forget
        self._limit: int | None = None
        self._log_store: LogStore | None = None
        self._pins: PinStore | None = None
        self._worker: CollectorWorker | None = None
        self._taking_part: Collector | None = None
        self.uses = UseLog(self._log_target, clock, telemetry)
        """What this node stored, used and removed."""

    def keep_limits(
        self, config: CollectorConfig, metrics: Metrics, on_collected: Callable[[], None]
    ) -> None:
        """Start to take part in the rounds; call once.

        `on_collected` is called after each round that this node began.
        """
        self.uses.configure(config.use_period, config.interval)
        self._limit = config.capacity or None
        self._worker = CollectorWorker(
            lambda: self._take_part(config),
            self.uses.request_flush,
            config,
            metrics,
            on_collected,
        )

    def _take_part(self, config: CollectorConfig) -> Collector:
        """Return this node's collector. Whether it collects depends on the server."""
        if self._taking_part is None:
            conditions, collects = Conditions.NONE, config.run == "always"
            if config.run == "auto":
                conditions = self._access.measured_support().conditions
                collects = conditions is not Conditions.NONE
                if not collects:
                    log.warning(
                        "this server does not honour conditional writes, so nodes cannot agree on "
                        "who collects; set collector.run = always on one node, or run `memkv gc`"
                    )
            self._taking_part = self.collector(config, conditions, collects=collects)
        return self._taking_part

    def collector(
        self,
        config: CollectorConfig,
        conditions: Conditions = Conditions.QUOTED,
        *,
        collects: bool = True,
    ) -> Collector:
        """Return a collector of this bucket.

        `conditions` are those that the server supports. Without conditional writes, no other node
        may collect.
        """
        self._access.demand_writer()
        return Collector(
            self.parts(conditions),
            config,
            forget=self._forget,
            flush=lambda: self.uses.flush(FLUSH_TIME),
            collects=collects,
        )

    def rebuilder(self, config: CollectorConfig, shards: int | None = None) -> Rebuilder:
        """Return the `Rebuilder`, which rebuilds the index from a listing."""
        return Rebuilder(self._supported_parts(), config, shards)

    def set_expiry(self, days: int) -> None:
        """Record the days after which the bucket's lifecycle rule expires pages; 0 means never.

        Raises `ConfigError`.
        """
        parts = self._supported_parts()
        write_format(
            parts.records,
            parts.names,
            lambda found: msgspec.structs.replace(found or BucketFormat(), days=days),
        )

    def _supported_parts(self) -> Parts:
        return self.parts(self._access.measured_support().conditions)

    def parts(self, conditions: Conditions = Conditions.QUOTED) -> Parts:
        """Return what collections use."""
        opened = self._access.path()
        bucket, records, names = opened.control
        return Parts(
            bucket,
            records.conditional(conditions),
            names,
            LogStore(bucket, records, names, self._telemetry),
            self.pins(),
            Renewer(opened.client, self._bucket, names, self._telemetry),
            self._telemetry,
            opened.format,
        )

    def pins(self) -> PinStore:
        """Return the pins of the bucket."""
        control = self._access.path().control
        if self._pins is None:  # Creating it twice at the same time is harmless.
            self._pins = PinStore(
                *control, count_unusable=partial(self._telemetry.count, "odd_pins")
            )
        return self._pins

    def read_pins(self) -> KeptPages:
        """Read which pages are pinned."""
        return self.pins().kept()

    def usage(self) -> TierUsage:
        """Return the result of the last collection by any node; zeros before the first one."""
        worker = self._worker
        if worker is None or worker.last is None:
            return TierUsage(pages=0, bytes=0, capacity=self._limit)
        return TierUsage(worker.last.pages, worker.last.bytes, self._limit, worker.removed)

    def close(self) -> None:
        """Stop collecting and logging; see `UseLog.close` for what is not logged yet."""
        if self._worker is not None:
            self._worker.close()
        self.uses.close(0.0)

    def _log_target(self) -> LogTarget:
        _, records, names = control = self._access.path().control
        if self._log_store is None:  # only the thread of the use log uses it
            self._log_store = LogStore(*control, self._telemetry)
        return LogTarget(self._log_store, partial(records.now, names.format))
