"""Find how much of a chain can be loaded from the two tiers together."""

import logging
import time

from memkv_sglang.engine.load_cost import LoadCostPolicy, Part
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.engine.trace import record_skipped, record_step
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain
from memkv_sglang.tiers.base import Lookup, Tier, TierError

log = logging.getLogger(__name__)

NOTHING = Lookup(0, complete=True)


class Finder:
    """Finds the longest prefix whose pages are all in the local or the shared tier."""

    def __init__(
        self,
        local: Tier | None,
        shared: Tier | None,
        costs: LoadCostPolicy | None,
        metrics: Metrics,
    ) -> None:
        """Search `local` first, which is fast. If given, `costs` limits the prefix."""
        self._local = local
        self._shared = shared
        self._costs = costs
        self._metrics = metrics

    def lookup(self, chain: Chain, budget: float, recompute: Recompute = UNKNOWN) -> Lookup:
        """Return the prefix that can be loaded, or the part of it found within `budget` seconds.

        Leaves out pages that are slower to load than to recompute. Never raises: a failing tier
        counts as empty, and the result is then incomplete.
        """
        parts: list[Part] = []
        found = self._search(chain, time.monotonic() + budget, parts)
        self._metrics.lookup_pages.labels("yes").inc(found.length)
        self._metrics.lookup_pages.labels("no").inc(len(chain.hashes) - found.length)
        if not found.complete:
            self._metrics.incomplete_lookups.inc()
        if self._costs is None:
            return found
        length = self._costs.limit(chain, parts, recompute)
        record_skipped(found.length - length)
        return found._replace(length=length)

    def _search(self, chain: Chain, deadline: float, parts: list[Part]) -> Lookup:
        """Search both tiers. Append to `parts` what each tier has of the prefix, in order."""
        near = self._lookup_in(self._local, chain, deadline, parts)
        if near.length == len(chain.hashes):
            return near
        far = self._lookup_in(self._shared, _after(chain, near.length), deadline, parts)
        length = near.length + far.length
        if far.length and length < len(chain.hashes):
            # Behind the pages in the shared tier, the disk may have pages that wait for upload.
            more = self._lookup_in(self._local, _after(chain, length), deadline, parts)
            length += more.length
            # A lookup counts as a use, and a parent's last use must be later than its children's.
            self._lookup_in(self._local, _before(chain, near.length), deadline, [])
        return Lookup(length, near.complete and far.complete)

    def _lookup_in(
        self, tier: Tier | None, chain: Chain, deadline: float, parts: list[Part]
    ) -> Lookup:
        if tier is None or not chain.hashes:
            return NOTHING
        began = time.perf_counter()
        try:
            found = tier.lookup(chain, deadline)
        except TierError as error:
            record_step(tier.name, len(chain.hashes), 0, began, str(error))
            log.debug("lookup failed", extra={"fields": {"tier": tier.name, "error": str(error)}})
            return Lookup(0, complete=False)
        record_step(tier.name, len(chain.hashes), found.length, began)
        parts.append(Part(tier.name, found.length))
        return found


def _after(chain: Chain, length: int) -> Chain:
    return Chain(chain.namespace, chain.hashes[length:])


def _before(chain: Chain, length: int) -> Chain:
    return Chain(chain.namespace, chain.hashes[:length])
