"""A wrapper that reports a tier's calls to the metrics and measures how fast it loads."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from typing_extensions import override

from memkv_sglang.engine.speed import TierSpeed
from memkv_sglang.metrics import CallMetrics
from memkv_sglang.page import Chain, Page
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier
from memkv_sglang.tiers.wrappers import WrapperTier


class MeasuredTier(WrapperTier):
    """Times lookups, loads and spills. Counts their pages by result and the bytes moved.

    Its `speed` predicts how long a load takes.
    """

    def __init__(self, inner: Tier, metrics: CallMetrics, label: str = "") -> None:
        """Wrap `inner`. Report its calls under `label`, which defaults to its name."""
        super().__init__(inner)
        self.speed = TierSpeed()
        self._metrics = metrics
        self._label = label or inner.name

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        with self._timed("lookup"):
            found = super().lookup(chain, deadline)
        self._count("lookup", {"found": found.length, "missing": len(chain.hashes) - found.length})
        return found

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        lengths = [page.length for page in pages]
        size, moved, late = sum(lengths), 0, False
        self.speed.begin(size)
        try:
            with self._timed("load"):
                outcomes = super().fetch(pages, deadline)
            results = [fetched.result for fetched in outcomes]
            loaded = _sum_where(lengths, results, LoadResult.LOADED)
            late = time.monotonic() >= deadline
            # A load that failed before its deadline says nothing about the speed.
            if late or LoadResult.FAILED not in results:
                moved = loaded
        finally:
            self.speed.end(size, moved, cut_short=late)
        self._count("load", _tally(results))
        self._count_bytes("load", loaded)
        return outcomes

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        with self._timed("spill"):
            results = super().spill(pages, deadline)
        self._count("spill", _tally(results))
        lengths = [page.length for page in pages]
        self._count_bytes("spill", _sum_where(lengths, results, SpillResult.STORED))
        return results

    @contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except Exception:
            self._metrics.errors.labels(self._label, operation).inc()
            raise
        finally:
            elapsed = time.perf_counter() - began
            self._metrics.duration.labels(self._label, operation).observe(elapsed)

    def _count(self, operation: str, results: dict[str, int]) -> None:
        for result, count in results.items():
            self._metrics.pages.labels(self._label, operation, result).inc(count)

    def _count_bytes(self, operation: str, total: int) -> None:
        self._metrics.bytes.labels(self._label, operation).inc(total)


def _sum_where(lengths: Sequence[int], results: Sequence[object], wanted: object) -> int:
    """Return the total length of the pages with a certain result."""
    paired = zip(lengths, results, strict=True)
    return sum([length for length, result in paired if result is wanted])


def _tally(results: Sequence[LoadResult] | Sequence[SpillResult]) -> dict[str, int]:
    # `Counter` would hash each result, which takes five times as long for enumerations.
    kinds = type(results[0]) if results else ()
    counts = {kind.name.lower(): results.count(kind) for kind in kinds}
    return {name: count for name, count in counts.items() if count}
