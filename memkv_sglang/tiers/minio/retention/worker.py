"""The agent's thread that takes part in the rounds of collection."""

import logging
import math
import random
import threading
import time
from collections.abc import Callable

from memkv_sglang.config.schema import CollectorConfig
from memkv_sglang.metrics import Metrics
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.retention.collector import Collector, settle
from memkv_sglang.tiers.minio.retention.rounds import Report, Round
from memkv_sglang.tiers.minio.retention.shards import RENEWALS, LeaseHeldError

log = logging.getLogger(__name__)

SHARE = 0.25
"""Share of the time that a collection may be active. The rest is left to loads and spills."""

LONGEST_PAUSE = 5.0
"""Maximum seconds between two steps."""

CLOSE_SECONDS = 0.5
"""Seconds that `close` waits for the current step."""

POLLS = 4
"""Number of times per interval that each node polls the record of the round."""

BUSY_SECONDS = 2.0
"""Seconds between two polls of a node that has begun a round."""

Open = Callable[[], "Collector | None"]


class _ClosingError(Exception):
    """The agent is shutting down."""


class CollectorWorker:
    """Begins rounds when they are due, and helps with those that take long.

    A node that does not collect still polls the round, because it must log its uses before pages
    are removed.
    """

    def __init__(
        self,
        open_collector: Open,
        request_flush: Callable[[], None],
        config: CollectorConfig,
        metrics: Metrics,
        on_collected: Callable[[], None],
    ) -> None:
        """Start the thread.

        `open_collector` may block, and raise `TierError`. `request_flush` makes this node write its
        log. `on_collected` is called after each round that this node began.
        """
        self._on_collected = on_collected
        self._open = open_collector
        self._request_flush = request_flush
        self._config = config
        self._metrics = metrics
        self._last: Report | None = None
        self._removed = (0, 0)
        self._collects: bool | None = None
        self._driving = False
        self._waiting = False
        """Whether pages are to be removed at a time that is known."""
        self._removal = 0.0
        """That time, on `time.monotonic`."""
        self._began = 0.0
        self._noted = -1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memkv-collect", daemon=True)
        self._thread.start()

    @property
    def last(self) -> Report | None:
        """Report of the last round."""
        return self._last

    @property
    def removed(self) -> int:
        """Number of pages and bytes that this node has removed since it started."""
        return self._removed[0]

    def close(self) -> None:
        """Stop after the current step. Waits at most `CLOSE_SECONDS`. Idempotent.

        If the server does not answer, leases expire by themselves.
        """
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def _pause(self) -> float:
        interval = self._config.interval / POLLS
        if self._waiting:
            left = min(self._removal - time.monotonic(), interval)
            return max(left, settle(self._config) / 2)
        if self._driving:
            return min(BUSY_SECONDS, interval)
        # The jitter keeps nodes that were started together from polling together.
        return interval * random.uniform(0.5, 1.0)  # noqa: S311

    def _run(self) -> None:
        while not self._closed.wait(self._pause()):
            try:
                self._look()
            except _ClosingError:
                return
            except LeaseHeldError as error:
                log.info("collection left to another node", extra={"fields": {"why": str(error)}})
            except TierError as error:
                if self._closed.is_set():  # closing the tier aborts requests
                    return
                self._metrics.collections.labels("failed").inc()
                log.warning("collection failed", extra={"fields": {"reason": str(error)}})
            except Exception:
                self._metrics.collections.labels("failed").inc()
                log.exception("collection failed")

    def _look(self) -> None:
        collector = self._open()
        if collector is None:
            return
        current = collector.look().current
        self._last = current.report or self._last
        if self._wait_for_removal(collector, current) <= 0:
            self._request_flush()
        if not collector.collects:
            return
        if current.phase == "done":
            self._finish(collector, current)
            if not collector.is_due() or not collector.begin():
                return
            self._driving, self._began = True, time.monotonic()
        pacer = _Pacer(self._closed, self._config.lease_ttl)
        before = collector.removed
        try:
            while collector.advance(pacer.step):
                current = collector.look().current
                self._wait_for_removal(collector, current)
                if current.phase != "merge":
                    break
        finally:
            self._count(collector, before)
        self._finish(collector, collector.look().current)

    def _wait_for_removal(self, collector: Collector, current: Round) -> float:
        """Note when pages are to be removed; return the seconds until then, if they are known."""
        self._waiting = current.phase == "remove"
        if not self._waiting:
            return math.inf
        left = current.remove_at - collector.now()
        self._removal = time.monotonic() + left
        return left

    def _count(self, collector: Collector, before: tuple[int, int]) -> None:
        self._removed = collector.removed
        self._metrics.collected_pages.inc(self._removed[0] - before[0])
        self._metrics.collected_bytes.inc(self._removed[1] - before[1])
        self._metrics.collection_memory_bytes.set(collector.memory)

    def _finish(self, collector: Collector, current: Round) -> None:
        """Report a round that this node has begun and that is over."""
        report = current.report
        if current.phase != "done" or report is None or not self._driving:
            return
        self._driving = self._waiting = False
        self._last = report
        collector.free()
        self._metrics.collections.labels("done").inc()
        seconds = time.monotonic() - self._began
        self._metrics.collection_duration.observe(seconds)
        self._metrics.collection_last_success.set_to_current_time()
        self._on_collected()
        fields = {
            "removed_pages": report.removed_pages,
            "removed_bytes": report.removed_bytes,
            "pages": report.pages,
            "bytes": report.bytes,
            "seconds": round(seconds, 1),
        }
        log.info("bucket collected", extra={"fields": fields})
        if 0 < self._config.capacity < report.bytes and report.kept_pages:
            log.warning(
                "the bucket exceeds its capacity and all other pages are pinned; unpin some, or "
                "raise collector.capacity",
                extra={"fields": {"kept_pages": report.kept_pages}},
            )


class _Pacer:
    """Sleeps between the steps of a collection, to limit its load."""

    def __init__(self, closed: threading.Event, seconds: float) -> None:
        self._longest = min(LONGEST_PAUSE, seconds / RENEWALS / 2)
        self._closed = closed
        self._began = time.monotonic()

    def step(self, _what: str, _done: int, _total: int | None) -> None:
        worked = time.monotonic() - self._began
        if self._closed.wait(min(worked * (1 / SHARE - 1), self._longest)):
            raise _ClosingError
        self._began = time.monotonic()
