"""Never slower than recomputing: how much of what is there pays to be loaded."""

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
"""Pages that SGLang asks for in one load."""

VERDICT_SECONDS = 10.0
"""How long a prefix once answered is not answered longer: SGLang asks several times a request."""

MAX_VERDICTS = 4096


class Part(NamedTuple):
    """Pages of a chain, one after the other, that one tier would load."""

    tier: str
    pages: int


class LoadCostPolicy:
    """Weighs loads against recomputation. Thread-safe."""

    def __init__(
        self,
        speeds: dict[str, TierSpeed],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`speeds` are the tiers' by name."""
        self._speeds = speeds
        self._metrics = metrics
        self._clock = clock
        self._verdicts: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._explained = False

    def limit(self, chain: Chain, parts: Sequence[Part], recompute: Recompute) -> int:
        """Return how many pages of what was found, from the first, to load.

        Loading the prefix and computing the rest then takes least, as far as is known. A chain
        for which that was less than all keeps the answer for a while.
        """
        lengths = list(accumulate((part.pages for part in parts), initial=0))
        found = lengths[-1]
        if not found or not recompute.page_seconds:
            return found
        key = chain.namespace + chain.hashes[0] + chain.hashes[-1]
        kept, until = self._verdicts.get(key, (found, 0.0))
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
        # Within a part time grows evenly, so that one of its ends is best; but for a part in which
        # one tier's time passes the other's, where little is lost by not looking closer.
        def seconds(count: int) -> float:
            load = self._load_seconds(parts[:count], recompute.page_bytes)
            return load + recompute.page_seconds * (lengths[-1] - lengths[count])

        return lengths[min(reversed(range(len(lengths))), key=seconds)]

    def _load_seconds(self, parts: Sequence[Part], page_bytes: int) -> float:
        """Return how long the parts take: tiers load at the same time, each its own pages."""
        pages = dict.fromkeys(self._speeds, 0)
        for part in parts:
            pages[part.tier] += part.pages
        return max(
            self._speeds[tier].seconds(-(-count // CALL_PAGES), count * page_bytes) if count else 0
            for tier, count in pages.items()
        )

    def _keep(self, key: bytes, length: int) -> None:
        self._verdicts[key] = (length, self._clock() + VERDICT_SECONDS)
        while len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)

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
            "way_out": "engine.skip_slow_loads = false loads all the same",
        }
        log.warning(
            "loading would take longer than computing: lookups answer with the prefix that pays; "
            "memkv_skipped_slow_pages_total counts, this line appears once",
            extra={"fields": fields},
        )
