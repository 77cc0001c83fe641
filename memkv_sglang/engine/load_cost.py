"""Limit loads to the pages that load faster than they can be recomputed."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from memkv_sglang.engine.recompute import Recompute
from memkv_sglang.engine.speed import TierSpeed
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain

log = logging.getLogger(__name__)

CALL_PAGES = 128
"""Pages per load call. SGLang loads this many at a time."""

DECISION_TTL = 10.0
"""Seconds during which repeated lookups of a chain get no longer prefix than the first one. SGLang
looks up a request several times."""

MAX_DECISIONS = 4096


class Part(NamedTuple):
    """Consecutive pages of a chain that the same tier would load."""

    tier: str
    pages: int


class LoadCostPolicy:
    """Compares how long pages take to load and to recompute. Thread-safe."""

    def __init__(
        self,
        speeds: dict[str, TierSpeed],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`speeds` maps tier names to their measured speeds."""
        self._speeds = speeds
        self._metrics = metrics
        self._clock = clock
        self._decisions: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._explained = False

    def limit(self, chain: Chain, parts: Sequence[Part], recompute: Recompute) -> int:
        """Return how many of the found pages to load, counted from the first.

        Chooses the prefix with the least estimated time to load it and recompute the rest. A chain
        whose prefix was cut keeps that limit for `DECISION_TTL` seconds.
        """
        lengths = list(accumulate((part.pages for part in parts), initial=0))
        found = lengths[-1]
        if not found or not recompute.page_seconds:
            return found
        key = chain.namespace + chain.hashes[0] + chain.hashes[-1]
        kept, until = self._decisions.get(key, (found, 0.0))
        if self._clock() < until:
            best = min(found, kept)
        else:
            best = self._best(lengths, parts, recompute)
            if best < found:
                self._keep(key, best)
                self._explain(parts, recompute, found, best)
        self._metrics.skipped_slow_pages.inc(found - best)
        return best

    def _best(self, lengths: list[int], parts: Sequence[Part], recompute: Recompute) -> int:
        # Within a part, time grows linearly, so the optimum is at a boundary between parts. The
        # exception is a part in which the time of one tier overtakes that of the other; the error
        # is small.
        def seconds(count: int) -> float:
            load = self._load_seconds(parts[:count], recompute.page_bytes)
            return load + recompute.page_seconds * (lengths[-1] - lengths[count])

        return lengths[min(reversed(range(len(lengths))), key=seconds)]

    def _load_seconds(self, parts: Sequence[Part], page_bytes: int) -> float:
        """Return the time to load the parts, with both tiers in parallel."""
        pages = dict.fromkeys(self._speeds, 0)
        for part in parts:
            pages[part.tier] += part.pages
        return max(
            self._speeds[tier].seconds(-(-count // CALL_PAGES), count * page_bytes) if count else 0
            for tier, count in pages.items()
        )

    def _keep(self, key: bytes, length: int) -> None:
        self._decisions[key] = (length, self._clock() + DECISION_TTL)
        while len(self._decisions) > MAX_DECISIONS:
            self._decisions.popitem(last=False)

    def _explain(
        self, parts: Sequence[Part], recompute: Recompute, found: int, answered: int
    ) -> None:
        if self._explained:
            return
        self._explained = True
        fields = {
            "tiers": ",".join(part.tier for part in parts if part.pages),
            "found_pages": found,
            "answered_pages": answered,
            "load_seconds": round(self._load_seconds(parts, recompute.page_bytes), 3),
            "recompute_seconds": round(recompute.page_seconds * found, 3),
            "fix": "to load these pages anyway, set engine.skip_slow_loads = false",
        }
        log.warning(
            "loading is slower than recomputing, so lookups return a shorter prefix; "
            "memkv_skipped_slow_pages_total counts skipped pages; this is logged only once",
            extra={"fields": fields},
        )
