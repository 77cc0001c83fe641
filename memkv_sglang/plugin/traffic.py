"""Transfer statistics: bandwidth for SGLang's metrics, and loaded tokens by tier and request."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from memkv_sglang.agent import request_log
from memkv_sglang.agent.log import REQUEST_BURST, REQUEST_PERIOD
from memkv_sglang.agent.protocol import MAX_REQUEST_ID
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.log_limit import LogLimit
from memkv_sglang.printable import printable

TIERS = ("nvme", "minio")
"""The tiers that a page can come from."""

GIB = 1 << 30
"""The unit that SGLang's own backends call GB in these metrics."""


class Traffic:
    """Collects statistics until SGLang takes them. Thread-safe. Does no I/O."""

    def __init__(self, *, metrics: bool, count_requests: bool) -> None:
        """Collect nothing unless `metrics` is true.

        `count_requests` enables the counter of loaded tokens. Set it on one rank only: all ranks
        load the same tokens.
        """
        self.log_requests = "slow"
        """Setting `agent.log_requests`."""
        self._lines = LogLimit(REQUEST_PERIOD, REQUEST_BURST)
        self._metrics = metrics
        self._count_requests = metrics and count_requests
        self._lock = threading.Lock()
        self._loads: list[tuple[int, float]] = []
        self._spills: list[tuple[int, float]] = []
        self._request = threading.local()

    @contextmanager
    def load(self) -> Iterator[Counter[int]]:
        """Time a load. The caller adds its pages to the counter, by page size in bytes."""
        with self._timed(self._loads) as moved:
            yield moved

    @contextmanager
    def spill(self) -> Iterator[Counter[int]]:
        """Time a spill. For the counter, see `load`."""
        with self._timed(self._spills) as moved:
            yield moved

    @contextmanager
    def _timed(self, calls: list[tuple[int, float]]) -> Iterator[Counter[int]]:
        moved: Counter[int] = Counter()
        begin = time.perf_counter()
        yield moved
        seconds = time.perf_counter() - begin
        pages, size = moved.total(), sum(length * n for length, n in moved.items())
        if self._metrics and pages:
            with self._lock:
                calls.append((pages, size / GIB / max(seconds, 1e-9)))

    def take(self) -> Any:
        """Return SGLang's `StorageMetrics` since the last call; None if there were no transfers."""
        with self._lock:
            loads, spills = self._loads.copy(), self._spills.copy()
            self._loads.clear()
            self._spills.clear()
        if not loads and not spills:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in loads],
            prefetch_bandwidth=[rate for _, rate in loads],
            backup_pgs=[pages for pages, _ in spills],
            backup_bandwidth=[rate for _, rate in spills],
        )

    @contextmanager
    def lookup_of(self, request_id: str) -> Iterator[None]:
        """Attribute this thread's lookups to a request, and log how long they take."""
        with self._working_for(request_id):
            began = time.perf_counter()
            yield
            self._log_request("lookup", request_id, began, {})

    @contextmanager
    def load_of(self, request_id: str, page_size: int) -> Iterator[None]:
        """Attribute this thread's loads to a request; finally count and log the tokens by tier."""
        tiers, began = Counter[str](), time.perf_counter()
        with self._working_for(request_id):
            self._request.tiers = tiers
            try:
                yield
            finally:
                del self._request.tiers
                tokens = {tier: pages * page_size for tier, pages in tiers.items()}
                self._log_request("load", request_id, began, tokens)
                if self._count_requests:
                    for tier, count in tokens.items():
                        _loaded_tokens().labels(tier).inc(count)

    @contextmanager
    def _working_for(self, request_id: str) -> Iterator[None]:
        self._request.id = request_id
        try:
            yield
        finally:
            del self._request.id

    def _log_request(
        self, operation: str, request_id: str, began: float, tokens: dict[str, int]
    ) -> None:
        """Log a lookup or a load of a request, with the loaded tokens by tier."""
        seconds = time.perf_counter() - began
        logged = self.log_requests == "all" or (
            self.log_requests == "slow" and seconds >= request_log.SLOW
        )
        level = logging.INFO if logged else logging.DEBUG
        if not request_log.log.isEnabledFor(level) or self._lines.admit("") is None:
            return
        request = printable(request_id)[:MAX_REQUEST_ID]
        fields = {
            "operation": f"server_{operation}",
            "request": request,
            "client": os.getpid(),
            "seconds": seconds,
            **{f"{tier}_tokens": count for tier, count in tokens.items()},
        }
        request_log.log.log(
            level,
            "memkv: request %s: %s took %.3f s, loaded tokens: %s",
            *(request, operation, seconds, tokens or "none"),
            extra={"fields": fields},
        )

    @property
    def request_id(self) -> str:
        """Id of the request that this thread works for; empty if unknown."""
        return str(getattr(self._request, "id", ""))

    def record_tiers(self, loads: Sequence[PageLoad]) -> None:
        """Record which tier served each page of the anchor pool."""
        tiers = getattr(self._request, "tiers", None)
        if tiers is not None:
            tiers.update(load.tier for load in loads if load.tier)


@cache
def _loaded_tokens() -> Any:
    """Return this process's counter.

    SGLang sets up multiprocess metrics before anything may import prometheus_client, so the
    counter is created on first use.
    """
    from prometheus_client import REGISTRY

    return make_loaded_tokens_counter(REGISTRY)


def make_loaded_tokens_counter(registry: Any) -> Any:
    """Register `memkv_loaded_tokens_total`, with a series for each tier."""
    from prometheus_client import Counter as PrometheusCounter

    counter = PrometheusCounter(
        "memkv_loaded_tokens",
        "Tokens whose KV cache this server loaded from a tier",
        ["tier"],
        registry=registry,
    )
    for tier in TIERS:
        counter.labels(tier)
    return counter
