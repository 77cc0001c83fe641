"""The engine: look up, load and spill pages across the local and the shared tier."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.breaker import Breaker, BreakerTier, CircuitBreaker
from memkv_sglang.engine.changed import ChangedPages
from memkv_sglang.engine.gate import NamespaceGate
from memkv_sglang.engine.load import Loader
from memkv_sglang.engine.load_balance import LoadBalancer
from memkv_sglang.engine.load_cost import LoadCostPolicy
from memkv_sglang.engine.lookup import NOTHING, Finder
from memkv_sglang.engine.measured import MeasuredTier
from memkv_sglang.engine.namespace_publisher import NamespacePublisher
from memkv_sglang.engine.pins import PinWatcher
from memkv_sglang.engine.presence import present
from memkv_sglang.engine.promotion import Promoter
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.results import PageLoad, Removal, Warming
from memkv_sglang.engine.served import UNKNOWN_REQUEST, ServedRequest, count_savings
from memkv_sglang.engine.shards import GuardedShard, JointBreaker
from memkv_sglang.engine.spill import Spiller
from memkv_sglang.engine.status import EngineStatus
from memkv_sglang.engine.status_reporter import StatusReporter
from memkv_sglang.engine.uploads import UploadQueue
from memkv_sglang.engine.warming import Warmer
from memkv_sglang.metrics import Metrics
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PAGE_HASH_SIZE, Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    AccessRecorder,
    LoadResult,
    Lookup,
    PendingUploads,
    SpillResult,
    Tier,
    TierError,
)

log = logging.getLogger(__name__)

CLEAR_WAIT = 30.0
"""Seconds that `clear` waits for calls in flight. All of them have shorter deadlines."""

CLEAR_PASSES = 3
"""Maximum number of removals in one `clear`, which repeats while it still finds pages."""

CLOSE_SECONDS = 0.5
"""Minimum seconds for closing, in addition to the upload of the queue."""

ANY_PAGE = PageKey(bytes(NAMESPACE_DIGEST_SIZE), bytes(PAGE_HASH_SIZE))
"""The result for a page that no tier has."""


class Engine:
    """Moves pages between clients' buffers and the tiers. Thread-safe; all calls block.

    Faults of a medium are results, never exceptions. During a load or spill the engine owns the
    pages' buffers; no thread touches them after it returns.
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
        shards: Sequence[GuardedShard] = (),
    ) -> None:
        """Take ownership of both tiers.

        Args:
            local: this node's tier, if any.
            shared: the tier of all nodes, if any.
            marks: durable record of pages that wait for upload; None disables uploads.
            config: settings of the engine.
            metrics: where to count.
            uses: records which pages were used, for the shared tier's eviction.
            watcher: keeps pinned pages in the local tier.
            shards: the shared tier's shards, if it has any. Each has a circuit breaker.

        """
        self._watcher = watcher
        self._shards = shards
        self._uses = uses
        self._config = config
        self._metrics = metrics
        self._gate = NamespaceGate()
        breaker = CircuitBreaker(
            shared.name if shared else "", config.breaker_failures, config.breaker_cooldown
        )
        self._breaker: Breaker = JointBreaker(shards) if shards else breaker
        near = MeasuredTier(local, metrics.calls) if local else None
        # Measure inside the breaker, so that calls that it rejects do not count as fast.
        far = MeasuredTier(shared, metrics.calls) if shared else None
        self._local = near
        self._shared: Tier | None = far if far is None or shards else BreakerTier(far, breaker)
        self._tiers: list[Tier] = [t for t in (self._local, self._shared) if t is not None]
        for tier in self._tiers:
            metrics.add_tier(tier.name)
        speeds = {tier.name: tier.speed for tier in (near, far) if tier is not None}
        costs = LoadCostPolicy(speeds, metrics) if config.skip_slow_loads else None
        changed = ChangedPages(metrics)
        self._promoter = self._make_promoter(metrics, changed)
        # Uploads read without metrics, which count only clients' loads.
        self._uploads = self._make_uploads(local, marks, metrics)
        self._finder = Finder(self._local, self._shared, costs, metrics)
        balancer = self._make_balancer(near, far)
        self._loader = Loader(self._local, self._shared, self._promoter, metrics, changed, balancer)
        self._spiller = Spiller(
            self._local, self._shared, self._uploads, bypass_local=self._bypass_local()
        )
        self._publisher = NamespacePublisher(self._shared) if self._shared else None
        self._warmer = Warmer(self._local, self._shared, self._gate)
        self._reporter = StatusReporter(
            self._tiers,
            self._breaker if shared else None,
            self._uploads,
            metrics,
            shards,
        )
        self.status()  # sets the gauges before the first scrape

    def _make_promoter(self, metrics: Metrics, changed: ChangedPages) -> Promoter | None:
        if self._local is None or self._shared is None or self._config.promote == "never":
            return None
        config = self._config
        # If spills bypass the disk, the spill counts as the first use and the load as the second.
        rule = (
            "always" if self._bypass_local() and config.promote == "second_use" else config.promote
        )
        return Promoter(self._local, rule, config.promote_buffer, metrics, changed, self._gate)

    def _make_balancer(
        self, near: MeasuredTier | None, far: MeasuredTier | None
    ) -> LoadBalancer | None:
        if not self._config.balance_loads or near is None or far is None:
            return None
        lacks = self._uploads.lacks if self._uploads else lambda _: False
        return LoadBalancer(near.speed, far.speed, lacks)

    def _bypass_local(self) -> bool:
        """Return whether spills go to the shared tier first."""
        return self._config.admission == "second_use" and self._shared is not None

    def _make_uploads(
        self, local: Tier | None, marks: PendingUploads | None, metrics: Metrics
    ) -> UploadQueue | None:
        if local is None or self._shared is None or marks is None:
            return None
        uploads = UploadQueue(
            local,
            self._shared,
            marks,
            self._breaker,
            metrics,
            self._gate,
            backlog=self._config.upload_backlog,
            attempts=self._config.upload_attempts,
            rule=self._config.upload,
        )
        marks.on_return(uploads.resume)
        return uploads

    def describe(self, namespace: Namespace) -> None:
        """Store a namespace's description: locally now, in the shared tier in the background."""
        if self._local is not None:
            _describe(self._local, namespace)
        if self._publisher is not None:
            self._publisher.offer(namespace)

    def lookup(
        self, chain: Chain, budget: float | None = None, recompute: Recompute = UNKNOWN
    ) -> Lookup:
        """Return the longest prefix that can be loaded, to the page, within `budget` seconds.

        If time ran out or a tier failed, `complete` is false and the length is a lower bound. The
        default budget is `engine.lookup_budget`. If the cost to `recompute` a page is known, the
        result is cut to the prefix that loads faster than it can be recomputed at current speeds.
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
        """Return for each page whether it is stored. Blocks for at most `budget` seconds.

        Unlike `lookup`, this assumes no order among the pages and does not count as a use of them.
        `tier` restricts the check to one tier. Pages not checked in time count as absent.
        """
        seconds = self._config.lookup_budget if budget is None else budget
        tiers = [one for one in self._tiers if tier in ("", one.name)]
        if not keys:
            return []
        with self._gate.enter(keys[0].namespace) as is_open:
            return present(tiers if is_open else [], keys, time.monotonic() + seconds)

    def probe(self, budget: float) -> None:
        """Ask every tier and shard about a page, which shows whether they work."""
        self.present([ANY_PAGE], budget)
        for shard in self._shards:
            with suppress(TierError):
                shard.tier.present([ANY_PAGE], time.monotonic() + budget)

    def load(
        self, pages: Sequence[Page], served: ServedRequest = UNKNOWN_REQUEST
    ) -> list[PageLoad]:
        """Load pages of a chain, each from the nearest tier. The first miss ends the prefix."""
        if not pages:
            return []
        with self._gate.enter(pages[0].key.namespace) as is_open:
            if not is_open:
                skipped = [PageLoad(LoadResult.SKIPPED)] * (len(pages) - 1)
                return [PageLoad(LoadResult.MISSING), *skipped]
            loads = self._loader.load(pages, time.monotonic() + self._config.batch_deadline)
            loaded = sum(one.result is LoadResult.LOADED for one in loads)
            self._record_use(pages[0].length, (page.key for page in pages[:loaded]))
            count_savings(loads, served, self._metrics)
            return loads

    def spill(self, pages: Sequence[Page], before: Sequence[bytes] = ()) -> list[SpillResult]:
        """Store pages of a chain, which follows the pages with the hashes `before`.

        The chain is uploaded only if the last page before it is. All pages before it count as used,
        so that this node does not evict them before their descendants. Every page is `REFUSED`
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
        if self._publisher is not None:
            self._publisher.renew(namespace)
        # so that none of them is evicted to make space for its own descendants
        self._touch(Chain(namespace, before))
        results = self._spiller.spill(pages, parent, deadline)
        whole = Chain(namespace, [*before, *(page.key.hash for page in pages)])
        if before:
            self._touch(whole)
            self._record_use(pages[0].length, (PageKey(namespace, one) for one in before))
        # A spill names the whole chain, so the pages' positions in it are known.
        if self._uses is not None:
            self._uses.record_access(whole, range(len(whole.hashes)))
        return results

    def _record_use(self, length: int, keys: Iterable[PageKey]) -> None:
        """Tell the upload queue that pages of a chain were used again; each has `length` bytes."""
        if self._uploads is not None and self._uploads.tracks_use:
            self._uploads.use(list(keys), length)

    def _touch(self, chain: Chain) -> None:
        if self._local is not None and chain.hashes:
            self._local.touch(chain)

    def warm(self, keys: Sequence[PageKey]) -> Warming:
        """Copy pages of a chain from the shared to the local tier. See `Warmer.warm`."""
        return self._warmer.warm(keys)

    def clear(self, namespace: bytes) -> Removal:
        """Delete a namespace's pages from every reachable tier.

        Waits for calls in flight, and cancels the namespace's uploads and promotions. Until this
        returns, lookups find none of its pages and spills are refused. Takes long if the shared
        tier has many pages.
        """
        return self._empty(namespace, lambda tier: tier.clear(namespace))

    def hide(self, namespace: bytes) -> Removal:
        """Treat a namespace's pages as missing on this node until they are stored again.

        Works as `clear`, except that other nodes and the shared tier keep their pages.
        """
        return self._empty(namespace, lambda tier: tier.hide(namespace))

    def _empty(self, namespace: bytes, empty: Callable[[Tier], int]) -> Removal:
        removed = 0
        with self._gate.close(namespace, CLEAR_WAIT) as complete:
            if not complete:
                log.warning("namespace cleared while calls were in flight; clear it again")
            for worker in (self._uploads, self._promoter, self._publisher):
                if worker is not None:
                    worker.forget(namespace)
            for tier in self._tiers:
                try:
                    removed += _empty_tier(tier, empty)
                except TierError as error:
                    complete = False
                    fields = {"tier": tier.name, "error": str(error)}
                    log.warning("cannot clear a namespace", extra={"fields": fields})
        return Removal(removed, complete)

    def flush(self, timeout: float) -> bool:
        """Wait until uploads and promotions have finished and the use of pages is logged.

        Returns False after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        workers = [worker for worker in (self._promoter, self._uploads) if worker is not None]
        flushes = [worker.flush for worker in workers]
        if self._uses is not None:
            flushes.append(self._uses.flush_accesses)
        return all(flush(max(0.0, deadline - time.monotonic())) for flush in flushes)

    def status(self) -> EngineStatus:
        """Return the current state, and update the gauges."""
        return self._reporter.report()

    def close(self, drain: float) -> None:
        """Upload for at most `drain` seconds, then close the tiers. Idempotent."""
        deadline = time.monotonic() + max(drain, CLOSE_SECONDS)
        if self._watcher is not None:
            self._watcher.close()
        if self._publisher is not None:
            self._publisher.close()
        if self._uploads is not None:
            self._uploads.close(drain)
        if self._promoter is not None:
            self._promoter.close()
        self._loader.close()
        for tier in self._tiers:
            tier.close(deadline)


def _empty_tier(tier: Tier, empty: Callable[[Tier], int]) -> int:
    """Remove pages until none are left: the server may still complete uploads that timed out."""
    removed = 0
    for _ in range(CLEAR_PASSES):
        found = empty(tier)
        removed += found
        if not found:
            break
    return removed


def _describe(tier: Tier, namespace: Namespace) -> None:
    try:
        tier.describe(namespace)
    except TierError as error:
        fields = {"tier": tier.name, "error": str(error)}
        log.warning("cannot store a namespace description", extra={"fields": fields})
