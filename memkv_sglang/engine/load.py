"""Loads: each page from the nearest tier that has it, both tiers at once, equal pages once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from memkv_sglang.engine.promotion import Promoter
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.engine.single_flight import SingleFlight
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page
from memkv_sglang.tiers.base import LoadResult, Tier, TierError

CONCURRENT_CALLS = 32
"""Loads that may read from both tiers at one time; more of them read one tier after the other."""


class Loader:
    """Fills pages. See `load`."""

    def __init__(
        self,
        local: Tier | None,
        shared: Tier | None,
        promoter: Promoter | None,
        metrics: Metrics,
    ) -> None:
        """Prefer `local`; offer what came from `shared` to the promoter."""
        self._local = local
        self._shared = shared
        self._promoter = promoter
        self._metrics = metrics
        self._flights = SingleFlight()
        self._beside = ThreadPoolExecutor(CONCURRENT_CALLS, thread_name_prefix="memkv-load")

    def load(self, pages: Sequence[Page], deadline: float) -> list[PageLoad]:
        """Fill the pages of a chain, in order; one result a page.

        The first page that is not loaded ends the prefix: those behind it are `SKIPPED`. Blocks
        until nobody writes into any of the buffers any more, at most shortly past the deadline.
        """
        followed = self._flights.join(pages)
        leading = [i for i, follower in enumerate(followed) if follower is None]
        loads = [PageLoad(LoadResult.FAILED)] * len(pages)
        try:
            fetched = self._fetch([pages[i] for i in leading], deadline)
            for i, load in zip(leading, fetched, strict=True):
                loads[i] = load
        finally:
            for i in leading:
                self._flights.finish(pages[i], *loads[i])
        for i, follower in enumerate(followed):
            if follower is not None:
                loads[i] = PageLoad(*self._flights.wait(follower, deadline))
                self._metrics.merged_pages.inc(loads[i].result is LoadResult.LOADED)
                if loads[i].result is LoadResult.SKIPPED:  # behind a miss of the leader's chain
                    loads[i] = self._fetch([pages[i]], deadline)[0]
        return _end_prefix_at_first_miss(loads)

    def _fetch(self, pages: Sequence[Page], deadline: float) -> list[PageLoad]:
        here = self._held_locally(pages, deadline)
        near = [i for i, held in enumerate(here) if held]
        far = [i for i, held in enumerate(here) if not held]
        loads = [PageLoad(LoadResult.MISSING)] * len(pages)
        beside = None
        if near and far and self._shared is not None:
            beside = self._beside.submit(self._read, self._shared, pages, far, loads, deadline)
        elif far:
            self._read(self._shared, pages, far, loads, deadline)
        try:
            self._read(self._local, pages, near, loads, deadline)
        finally:
            if beside is not None:
                beside.result()
        # What the disk lost since it was asked may still be in the shared tier.
        lost = [i for i in near if loads[i].result is not LoadResult.LOADED]
        self._read(self._shared, pages, lost, loads, deadline)
        self._promote(pages, loads)
        return loads

    def _held_locally(self, pages: Sequence[Page], deadline: float) -> list[bool]:
        if self._local is None or not pages:
            return [False] * len(pages)
        try:
            return self._local.present([page.key for page in pages], deadline)
        except TierError:
            return [False] * len(pages)

    def _read(
        self,
        tier: Tier | None,
        pages: Sequence[Page],
        which: Sequence[int],
        loads: list[PageLoad],
        deadline: float,
    ) -> None:
        if tier is None or not which:
            return
        results = tier.load([pages[i] for i in which], deadline)
        for i, result in zip(which, results, strict=True):
            loads[i] = PageLoad(result, tier.name if result is LoadResult.LOADED else "")

    def _promote(self, pages: Sequence[Page], loads: Sequence[PageLoad]) -> None:
        if self._promoter is None or self._shared is None:
            return
        name = self._shared.name
        self._promoter.offer([p for p, load in zip(pages, loads, strict=True) if load.tier == name])

    def close(self) -> None:
        """Wait for loads in flight."""
        self._beside.shutdown()


def _end_prefix_at_first_miss(loads: list[PageLoad]) -> list[PageLoad]:
    missed = (i for i, load in enumerate(loads) if load.result is not LoadResult.LOADED)
    end = next(missed, len(loads)) + 1
    return loads[:end] + [PageLoad(LoadResult.SKIPPED)] * len(loads[end:])
