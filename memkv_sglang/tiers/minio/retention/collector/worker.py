"""The agent's collector thread. Of all nodes in the cluster, one collects at a time."""

import logging
import random
import threading
import time
from collections.abc import Callable

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.retention.collector.collect import Collection, Collector
from memkv_sglang.tiers.minio.retention.collector.lease import (
    RENEWALS,
    Lease,
    LeaseHeldError,
    Report,
)

log = logging.getLogger(__name__)

SHARE = 0.25
"""Share of the time that a collection is active; the rest is left to loads and spills."""

LONGEST_PAUSE = 5.0
"""Maximum pause between two steps, in seconds."""

CLOSE_SECONDS = 0.5
"""How long `close` waits for the current step, in seconds."""

POLLS = 4
"""Number of times per interval that each node checks whether a collection is due."""

Open = Callable[[], tuple[Collector, Lease]]


class _ClosingError(Exception):
    """The agent is shutting down."""


class CollectorWorker:
    """Collects when the last collection of any node ended at least an interval ago."""

    def __init__(self, open_collector: Open, config: CollectorConfig, metrics: Metrics) -> None:
        """Start the thread. `open_collector` may block, and raise `TierError`."""
        self._open = open_collector
        self._config = config
        self._metrics = metrics
        self._last: Report | None = None
        self._removed = 0
        self._warned = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memkv-collect", daemon=True)
        self._thread.start()

    @property
    def last(self) -> Report | None:
        """Report of the last collection of any node."""
        return self._last

    @property
    def removed(self) -> int:
        """Number of pages that this node has removed since it started."""
        return self._removed

    def close(self) -> None:
        """Stop after the current step; wait `CLOSE_SECONDS` at most; idempotent.

        If the server does not answer, the lease expires by itself.
        """
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        pause = self._config.interval / POLLS
        # The jitter keeps nodes that started together from asking together.
        while not self._closed.wait(pause * random.uniform(0.5, 1.0)):  # noqa: S311
            try:
                self._look()
            except LeaseHeldError as error:
                log.info("collection left to another node", extra={"fields": {"why": str(error)}})
            except TierError as error:
                if self._closed.is_set():  # closing aborts requests
                    return
                self._metrics.collections.labels("failed").inc()
                log.warning("collection failed", extra={"fields": {"reason": str(error)}})
            except Exception:
                self._metrics.collections.labels("failed").inc()
                log.exception("collection failed")

    def _look(self) -> None:
        collector, lease = self._open()
        state = lease.state()
        self._last = state.report or self._last
        if state.holder or (state.ended is not None and state.ended < self._config.interval):
            return
        lease.acquire()
        if lease.versioned and not self._warned:
            self._warned = True
            log.warning(
                "the bucket keeps versions, so removing pages frees no space; run `memkv bucket "
                "setup` for advice"
            )
        self._collect(collector, lease)

    def _collect(self, collector: Collector, lease: Lease) -> None:
        begin = time.monotonic()
        report: Report | None = None
        try:
            pacer = _Pacer(lease, self._closed, self._config.lease_ttl)
            collection = collector.collect(pacer.step, hold=lease.renew)
            report = collection.report
        except _ClosingError:
            return
        finally:
            lease.release(report)
        self._note(collection, time.monotonic() - begin)

    def _note(self, collection: Collection, seconds: float) -> None:
        report = self._last = collection.report
        self._removed += report.removed_pages
        self._metrics.collections.labels("done").inc()
        self._metrics.collection_duration.observe(seconds)
        self._metrics.collection_last_success.set_to_current_time()
        self._metrics.collected_pages.inc(report.removed_pages)
        self._metrics.collected_bytes.inc(report.removed_bytes)
        fields = {
            "removed_pages": report.removed_pages,
            "removed_bytes": report.removed_bytes,
            "pages": report.pages,
            "bytes": report.bytes,
            "seconds": round(seconds, 1),
        }
        log.info("bucket collected", extra={"fields": fields})
        if not collection.satisfied:
            log.warning(
                "the bucket exceeds its capacity and all other pages are pinned; unpin some, or "
                "raise collector.capacity",
                extra={"fields": {"kept_pages": report.kept_pages}},
            )


class _Pacer:
    """Renews the lease between the steps of a collection, and sleeps to limit the load."""

    def __init__(self, lease: Lease, closed: threading.Event, seconds: float) -> None:
        self._lease = lease
        self._longest = min(LONGEST_PAUSE, seconds / RENEWALS)
        self._closed = closed
        self._began = time.monotonic()

    def step(self, _what: str, _done: int, _total: int | None) -> None:
        worked = time.monotonic() - self._began
        self._lease.renew()
        if self._closed.wait(min(worked * (1 / SHARE - 1), self._longest)):
            raise _ClosingError
        self._lease.renew()
        self._began = time.monotonic()
