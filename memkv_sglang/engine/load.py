"""Load each page from its nearest tier, from both tiers in parallel, and equal pages only once."""

import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from memkv_sglang.engine.changed import ChangedPages
from memkv_sglang.engine.load_balance import LoadBalancer
from memkv_sglang.engine.promotion import Promoter
from memkv_sglang.engine.results import Arrival, PageLoad
from memkv_sglang.engine.single_flight import Follower, SingleFlight
from memkv_sglang.engine.trace import EQUAL_LOADS, record_step
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Page, page_checksum
from memkv_sglang.tiers.base import LoadResult, Tier, TierError

CONCURRENT_CALLS = 32
"""Number of loads that can read from both tiers in parallel. Further loads wait for a thread."""


class Loader:
    """Loads pages from the local and the shared tier. Thread-safe."""

    def __init__(
        self,
        local: Tier | None,
        shared: Tier | None,
        promoter: Promoter | None,
        metrics: Metrics,
        changed: ChangedPages,
        balancer: LoadBalancer | None = None,
    ) -> None:
        """Prefer `local`, unless the balancer chooses `shared`.

        Pages that only `shared` holds are offered to the promoter.
        """
        self._balancer = balancer
        self._changed = changed
        self._local = local
        self._shared = shared
        self._promoter = promoter
        self._metrics = metrics
        self._flights = SingleFlight()
        self._executor = ThreadPoolExecutor(CONCURRENT_CALLS, thread_name_prefix="memkv-load")

    def load(self, pages: Sequence[Page], deadline: float) -> list[PageLoad]:
        """Load the pages of a chain, in order; return one result per page.

        The first page that is not loaded ends the prefix; later ones are `SKIPPED`. Blocks until no
        thread writes to any buffer any more, which is at most slightly after the deadline.
        """
        followed = self._flights.join(pages)
        leading = [i for i, follower in enumerate(followed) if follower is None]
        arrivals = [Arrival(LoadResult.FAILED)] * len(pages)
        try:
            self._fetch_some(pages, leading, arrivals, deadline)
        finally:
            for i in leading:
                self._flights.finish(pages[i], arrivals[i])
        if len(leading) < len(pages):
            self._follow(pages, followed, arrivals, deadline)
        return _end_prefix_at_first_miss([PageLoad(a.result, a.tier) for a in arrivals])

    def _follow(
        self,
        pages: Sequence[Page],
        followed: Sequence[Follower | None],
        arrivals: list[Arrival],
        deadline: float,
    ) -> None:
        """Wait for pages that other calls are loading. Load those that failed there.

        A page fails there if the other call's chain ended earlier, or if its client wrote to its
        memory during the load.
        """
        retries: list[int] = []
        began = time.perf_counter()
        for i, follower in enumerate(followed):
            if follower is None:
                continue
            arrival = self._flights.wait(follower, deadline)
            if arrival.result in (LoadResult.SKIPPED, LoadResult.FAILED):
                retries.append(i)
            elif arrival.result is not LoadResult.LOADED:
                arrivals[i] = arrival
            elif page_checksum(pages[i].key, pages[i].buffers) == arrival.checksum:
                arrivals[i] = arrival
                self._metrics.merged_pages.inc()
            else:
                retries.append(i)
                self._changed.report("equal load")
        waited = sum(follower is not None for follower in followed)
        record_step(EQUAL_LOADS, waited, waited - len(retries), began)
        if retries and time.monotonic() < deadline:
            self._fetch_some(pages, retries, arrivals, deadline)

    def _fetch_some(
        self,
        pages: Sequence[Page],
        which: Sequence[int],
        arrivals: list[Arrival],
        deadline: float,
    ) -> None:
        fetched = self._fetch([pages[i] for i in which], deadline)
        for i, arrival in zip(which, fetched, strict=True):
            arrivals[i] = arrival

    def _fetch(self, pages: Sequence[Page], deadline: float) -> list[Arrival]:
        local = self._held_locally(pages, deadline)
        near = [i for i, held in enumerate(local) if held]
        far = [i for i, held in enumerate(local) if not held]
        moved = set(self._balancer.choose(pages, near, far) if self._balancer else ())
        near, far = [i for i in near if i not in moved], [*far, *sorted(moved)]
        arrivals = [Arrival(LoadResult.MISSING)] * len(pages)
        shared_read = None
        if near and far and self._shared is not None:
            shared_read = self._executor.submit(
                copy_context().run, self._read, self._shared, pages, far, arrivals, deadline
            )
        elif far:
            self._read(self._shared, pages, far, arrivals, deadline)
        try:
            self._read(self._local, pages, near, arrivals, deadline)
        finally:
            if shared_read is not None:
                shared_read.result()
        # The shared tier may have pages that were just evicted from the local one.
        lost = [i for i in near if arrivals[i].result is not LoadResult.LOADED]
        self._read(self._shared, pages, lost, arrivals, deadline)
        missed = [i for i in sorted(moved) if arrivals[i].result is not LoadResult.LOADED]
        self._read(self._local, pages, missed, arrivals, deadline)
        self._metrics.balanced_pages.inc(len(moved) - len(missed))
        self._promote(pages, arrivals, moved)
        return arrivals

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
        arrivals: list[Arrival],
        deadline: float,
    ) -> None:
        if tier is None or not which:
            return
        began = time.perf_counter()
        outcomes = tier.fetch([pages[i] for i in which], deadline)
        loaded = sum(one.result is LoadResult.LOADED for one in outcomes)
        record_step(tier.name, len(which), loaded, began)
        for i, (result, checksum) in zip(which, outcomes, strict=True):
            name = tier.name if result is LoadResult.LOADED else ""
            arrivals[i] = Arrival(result, name, checksum)

    def _promote(
        self, pages: Sequence[Page], arrivals: Sequence[Arrival], held: Collection[int]
    ) -> None:
        """Offer the pages from the shared tier, except those that the local tier holds."""
        if self._promoter is None or self._shared is None:
            return
        name = self._shared.name
        self._promoter.offer(
            [
                page._replace(checksum=arrival.checksum)
                for i, (page, arrival) in enumerate(zip(pages, arrivals, strict=True))
                if arrival.tier == name and i not in held
            ]
        )

    def close(self) -> None:
        """Wait for parallel reads in flight."""
        self._executor.shutdown()


def _end_prefix_at_first_miss(loads: list[PageLoad]) -> list[PageLoad]:
    missed = (i for i, load in enumerate(loads) if load.result is not LoadResult.LOADED)
    end = next(missed, len(loads)) + 1
    return loads[:end] + [PageLoad(LoadResult.SKIPPED)] * len(loads[end:])
