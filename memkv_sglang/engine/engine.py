"""The engine: lookup, load and spill over a tier of this node and one that all nodes share."""

import logging
import time
from collections.abc import Mapping, Sequence

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.breaker import BreakerTier, CircuitBreaker
from memkv_sglang.engine.changed import ChangedPages
from memkv_sglang.engine.gate import NamespaceGate
from memkv_sglang.engine.load import Loader
from memkv_sglang.engine.load_cost import LoadCostPolicy
from memkv_sglang.engine.lookup import NOTHING, Finder
from memkv_sglang.engine.namespace_publisher import NamespacePublisher
from memkv_sglang.engine.pins import PinWatcher
from memkv_sglang.engine.presence import present
from memkv_sglang.engine.promotion import Promoter
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.results import PageLoad, Removal, Warming
from memkv_sglang.engine.speed import SpeedTier
from memkv_sglang.engine.spill import Spiller
from memkv_sglang.engine.status import EngineStatus, TierStatus
from memkv_sglang.engine.uploads import UploadQueue
from memkv_sglang.engine.warming import Warmer
from memkv_sglang.metrics import Metrics
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    AccessRecorder,
    LoadResult,
    Lookup,
    PendingUploads,
    SpillResult,
    Tier,
    TierError,
)
from memkv_sglang.tiers.wrappers import MeasuredTier

log = logging.getLogger(__name__)

CLEAR_WAIT = 30.0
"""Longest time that `clear` waits for calls in flight; each of them has a shorter deadline."""

CLEAR_PASSES = 3
CLOSE_SECONDS = 0.5
"""Seconds that closing may take beside the drain."""

NOTHING_LEFT_OUT: Mapping[str, str] = {}


class Engine:
    """All calls block, may come from any thread, and never raise for faults of a medium.

    From the begin of a load or spill to its return the engine owns the pages' buffers; after the
    return nobody touches them.
    """

    def __init__(
        self,
        local: Tier | None,
        shared: Tier | None,
        marks: PendingUploads | None,
        config: EngineConfig,
        metrics: Metrics,
        uses: AccessRecorder | None = None,
        watcher: PinWatcher | None = None,
        left_out: Mapping[str, str] = NOTHING_LEFT_OUT,
    ) -> None:
        """Own both tiers. `marks` is the local tier's memory of what waits for upload.

        `uses` is the shared tier's of what was used, `watcher` tells the local tier what to keep.
        `left_out` are tiers that could not be opened, with the reasons.
        """
        self._left_out = left_out
        self._watcher = watcher
        self._uses = uses
        self._config = config
        self._metrics = metrics
        self._breaker = CircuitBreaker(
            shared.name if shared else "", config.breaker_failures, config.breaker_open
        )
        near = SpeedTier(MeasuredTier(local, metrics)) if local else None
        # What the breaker answers by itself says nothing of the tier's speed.
        far = SpeedTier(MeasuredTier(shared, metrics)) if shared else None
        self._local = near
        self._shared = BreakerTier(far, self._breaker) if far else None
        speeds = {tier.name: tier.speed for tier in (near, far) if tier is not None}
        costs = LoadCostPolicy(speeds, metrics) if config.skip_slow_loads else None
        self._gate = NamespaceGate()
        changed = ChangedPages(metrics)
        self._promoter = self._make_promoter(changed)
        # Its own reads are no loads that anyone asked for: they go past the metrics.
        self._uploads = self._make_uploads(local, marks)
        self._finder = Finder(self._local, self._shared, costs, metrics)
        self._loader = Loader(self._local, self._shared, self._promoter, metrics, changed)
        self._spiller = Spiller(
            self._local, self._shared, self._uploads, past_local=self._past_local()
        )
        self._describer = NamespacePublisher(self._shared) if self._shared else None
        self._warmer = Warmer(self._local, self._shared, self._gate)
        self.status()  # so that the gauges are there before anybody asks

    def _make_promoter(self, changed: ChangedPages) -> Promoter | None:
        if self._local is None or self._shared is None or self._config.promote == "never":
            return None
        config = self._config
        # What was not written when it was spilled has had its first use by that.
        rule = "always" if self._past_local() and config.promote == "second_use" else config.promote
        return Promoter(
            self._local, rule, config.promote_buffer, self._metrics, changed, self._gate
        )

    def _past_local(self) -> bool:
        """Tell whether spills pass the local tier by."""
        return self._config.admission == "second_use" and self._shared is not None

    def _make_uploads(self, local: Tier | None, marks: PendingUploads | None) -> UploadQueue | None:
        if local is None or self._shared is None or marks is None:
            return None
        return UploadQueue(
            local,
            self._shared,
            marks,
            self._breaker,
            self._metrics,
            self._gate,
            backlog=self._config.upload_backlog,
            attempts=self._config.upload_attempts,
        )

    def describe(self, namespace: Namespace) -> None:
        """Keep the description beside the pages: locally at once, in the shared tier behind."""
        if self._local is not None:
            _describe(self._local, namespace)
        if self._describer is not None:
            self._describer.offer(namespace)

    def lookup(
        self, chain: Chain, budget: float | None = None, recompute: Recompute = UNKNOWN
    ) -> Lookup:
        """Return the longest prefix that can be loaded, as known after `budget` seconds at most.

        Page-exact. `complete` is False where time ran out or a tier could not answer: the length
        is then a lower bound. The default budget is the configured one. Given what it costs to
        `recompute` a page, the answer is the prefix that pays to be loaded at the tiers' present
        speed; all of it while that is not known.
        """
        seconds = self._config.lookup_budget if budget is None else budget
        with self._gate.enter(chain.namespace) as is_open:
            if not is_open:
                return NOTHING
            found = self._finder.lookup(chain, seconds, recompute)
        if self._uses is not None and found.length:
            self._uses.record_access(Chain(chain.namespace, chain.hashes[: found.length]))
        return found

    def present(
        self, keys: Sequence[PageKey], budget: float | None = None, tier: str = ""
    ) -> list[bool]:
        """Tell for each page whether it is there, as known after `budget` seconds at most.

        Unlike `lookup` it presumes no order among the pages, and is no use of them. `tier` names
        the one to ask; empty for both. What could not be asked for in time counts as absent.
        """
        seconds = self._config.lookup_budget if budget is None else budget
        tiers = [asked for asked in self._tiers() if tier in ("", asked.name)]
        if not keys:
            return []
        with self._gate.enter(keys[0].namespace) as is_open:
            return present(tiers if is_open else [], keys, time.monotonic() + seconds)

    def load(self, pages: Sequence[Page]) -> list[PageLoad]:
        """Fill the pages of a chain from the nearest tier; the first miss ends the prefix."""
        if not pages:
            return []
        with self._gate.enter(pages[0].key.namespace) as is_open:
            if not is_open:
                skipped = [PageLoad(LoadResult.SKIPPED)] * (len(pages) - 1)
                return [PageLoad(LoadResult.MISSING), *skipped]
            return self._loader.load(pages, time.monotonic() + self._config.batch_deadline)

    def spill(self, pages: Sequence[Page], before: Sequence[bytes] = ()) -> list[SpillResult]:
        """Store pages of a chain; `before` are the hashes of all pages before the first, in order.

        Of these the last one alone decides whether the pages are uploaded. That this node shall
        not evict any of them before the pages behind it takes them all. Every page is `REFUSED`
        while the namespace is being cleared.
        """
        if not pages:
            return []
        with self._gate.enter(pages[0].key.namespace) as is_open:
            if not is_open:
                return [SpillResult.REFUSED] * len(pages)
            return self._spill(pages, before)

    def _spill(self, pages: Sequence[Page], before: Sequence[bytes]) -> list[SpillResult]:
        deadline = time.monotonic() + self._config.batch_deadline
        namespace = pages[0].key.namespace
        parent = PageKey(namespace, before[-1]) if before else None
        if self._describer is not None:
            self._describer.renew(namespace)
        self._touch(Chain(namespace, before))  # so that none makes room for what follows it
        results = self._spiller.spill(pages, parent, deadline)
        if before:
            self._touch(Chain(namespace, [*before, *(page.key.hash for page in pages)]))
        return results

    def _touch(self, chain: Chain) -> None:
        if self._local is not None and chain.hashes:
            self._local.touch(chain)

    def warm(self, keys: Sequence[PageKey]) -> Warming:
        """Copy pages of a chain from the shared to the local tier; see `Warmer.warm`."""
        return self._warmer.warm(keys)

    def clear(self, namespace: bytes) -> Removal:
        """Remove a namespace's pages from every tier that can be reached.

        Waits for the calls on the namespace that are in flight, and cancels its uploads and
        promotions. Until this returns, nothing of the namespace is found or stored. May take long
        in a shared tier with many pages.
        """
        removed = 0
        with self._gate.close(namespace, CLEAR_WAIT) as complete:
            if not complete:
                log.warning("clearing a namespace whose calls have not ended; clear it again")
            for worker in (self._uploads, self._promoter, self._describer):
                if worker is not None:
                    worker.forget(namespace)
            for tier in self._tiers():
                try:
                    removed += _clear(tier, namespace)
                except TierError as error:
                    complete = False
                    fields = {"tier": tier.name, "error": str(error)}
                    log.warning("namespace not cleared", extra={"fields": fields})
        return Removal(removed, complete)

    def flush(self, timeout: float) -> bool:
        """Wait until nothing waits for upload or promotion; False if `timeout` seconds passed."""
        deadline = time.monotonic() + timeout
        behind = [worker for worker in (self._promoter, self._uploads) if worker is not None]
        return all(worker.flush(max(0.0, deadline - time.monotonic())) for worker in behind)

    def status(self) -> EngineStatus:
        """Return the state of the moment, and set the gauges by it."""
        statuses = [_left_out_status(*item) for item in self._left_out.items()]
        statuses += [_tier_status(tier) for tier in self._tiers()]
        for status in statuses:
            self._metrics.tier_works.labels(status.name).set(status.problem == "")
            self._metrics.tier_pages.labels(status.name).set(status.pages)
            self._metrics.tier_bytes.labels(status.name).set(status.bytes)
            self._metrics.evicted.labels(status.name).set(status.evicted)
        if self._shared is not None:
            self._metrics.breaker.labels(self._shared.name).set(self._breaker.state)
        return EngineStatus(
            tiers=statuses,
            queue_pages=self._uploads.pages if self._uploads else 0,
            queue_bytes=self._uploads.bytes if self._uploads else 0,
            breaker=self._breaker.state.name.lower() if self._shared else "none",
        )

    def _tiers(self) -> list[Tier]:
        return [tier for tier in (self._local, self._shared) if tier is not None]

    def close(self, drain: float) -> None:
        """Upload for at most `drain` seconds more, then close the tiers; idempotent."""
        deadline = time.monotonic() + max(drain, CLOSE_SECONDS)
        if self._watcher is not None:
            self._watcher.close()
        if self._describer is not None:
            self._describer.close()
        if self._uploads is not None:
            self._uploads.close(drain)
        if self._promoter is not None:
            self._promoter.close()
        self._loader.close()
        for tier in self._tiers():
            tier.close(deadline)


def _clear(tier: Tier, namespace: bytes) -> int:
    """Clear a tier until nothing is left: a server may still store an upload that timed out."""
    removed = 0
    for _ in range(CLEAR_PASSES):
        found = tier.clear(namespace)
        removed += found
        if not found:
            break
    return removed


def _describe(tier: Tier, namespace: Namespace) -> None:
    try:
        tier.describe(namespace)
    except TierError as error:
        fields = {"tier": tier.name, "error": str(error)}
        log.warning("namespace not described", extra={"fields": fields})


def _tier_status(tier: Tier) -> TierStatus:
    usage = tier.usage()
    return TierStatus(
        name=tier.name,
        problem=tier.problem(),
        pages=usage.pages,
        bytes=usage.bytes,
        capacity=usage.capacity,
        evicted=usage.evicted,
    )


def _left_out_status(name: str, problem: str) -> TierStatus:
    return TierStatus(name=name, problem=problem, pages=0, bytes=0, capacity=None, evicted=0)
