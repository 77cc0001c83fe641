"""A wrapper that reports a tier's calls to the metrics."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from typing_extensions import override

from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, Page
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier
from memkv_sglang.tiers.wrappers.base import WrapperTier


class MeasuredTier(WrapperTier):
    """Times lookups, loads and spills, and counts their pages by result and the bytes moved."""

    def __init__(self, inner: Tier, metrics: Metrics) -> None:
        """Wrap `inner` and report under its name."""
        super().__init__(inner)
        self._metrics = metrics
        metrics.initialize_tier(inner.name)

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        with self._timed("lookup"):
            found = super().lookup(chain, deadline)
        self._count("lookup", {"found": found.length, "missing": len(chain.hashes) - found.length})
        return found

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        with self._timed("load"):
            outcomes = super().fetch(pages, deadline)
        results = [fetched.result for fetched in outcomes]
        self._count("load", _tally(results))
        self._count_bytes("load", pages, [result == LoadResult.LOADED for result in results])
        return outcomes

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        with self._timed("spill"):
            results = super().spill(pages, deadline)
        self._count("spill", _tally(results))
        self._count_bytes("spill", pages, [result == SpillResult.STORED for result in results])
        return results

    @contextmanager
    def _timed(self, operation: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except Exception:
            self._metrics.call_errors.labels(self.name, operation).inc()
            raise
        finally:
            elapsed = time.perf_counter() - began
            self._metrics.call_duration.labels(self.name, operation).observe(elapsed)

    def _count(self, operation: str, results: dict[str, int]) -> None:
        for result, count in results.items():
            self._metrics.pages.labels(self.name, operation, result).inc(count)

    def _count_bytes(self, operation: str, pages: Sequence[Page], moved: Sequence[bool]) -> None:
        total = sum(page.length for page, did in zip(pages, moved, strict=True) if did)
        self._metrics.bytes.labels(self.name, operation).inc(total)


def _tally(results: Sequence[LoadResult] | Sequence[SpillResult]) -> dict[str, int]:
    return {result.name.lower(): count for result, count in Counter(results).items()}
