"""How much of a chain can be loaded, over both tiers."""

import logging
import time

from memkv_sglang.engine.load_cost import LoadCostPolicy, Part
from memkv_sglang.engine.recompute import UNKNOWN, Recompute
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain
from memkv_sglang.tiers.base import Lookup, Tier, TierError

log = logging.getLogger(__name__)

NOTHING = Lookup(0, complete=True)


class Finder:
    """Finds the longest prefix each page of which is in the local or in the shared tier."""

    def __init__(
        self,
        local: Tier | None,
        shared: Tier | None,
        costs: LoadCostPolicy | None,
        metrics: Metrics,
    ) -> None:
        """Ask `local` first: it knows at once. Without `costs` all that is there is answered."""
        self._local = local
        self._shared = shared
        self._costs = costs
        self._metrics = metrics

    def lookup(self, chain: Chain, budget: float, recompute: Recompute = UNKNOWN) -> Lookup:
        """Return the prefix known to be loadable when `budget` seconds are over, or sooner.

        Page-exact, but for what takes longer to load than to compute. Never raises: a tier that
        cannot answer counts as holding nothing, and the answer is then not complete.
        """
        parts: list[Part] = []
        found = self._search(chain, time.monotonic() + budget, parts)
        self._metrics.lookup_pages.labels("yes").inc(found.length)
        self._metrics.lookup_pages.labels("no").inc(len(chain.hashes) - found.length)
        if not found.complete:
            self._metrics.incomplete_lookups.inc()
        if self._costs is None:
            return found
        return found._replace(length=self._costs.limit(chain, parts, recompute))

    def _search(self, chain: Chain, deadline: float, parts: list[Part]) -> Lookup:
        """Look up; `parts` gets what each tier has of the prefix, in order."""
        near = self._ask(self._local, chain, deadline, parts)
        if near.length == len(chain.hashes):
            return near
        far = self._ask(self._shared, _after(chain, near.length), deadline, parts)
        length = near.length + far.length
        if far.length and length < len(chain.hashes):
            # The disk may go on where the shared tier ends: pages that still wait for upload.
            more = self._ask(self._local, _after(chain, length), deadline, parts)
            length += more.length
            # Asking is use, and roots must stay younger than leaves: use the first part again.
            self._ask(self._local, _before(chain, near.length), deadline, [])
        return Lookup(length, near.complete and far.complete)

    def _ask(self, tier: Tier | None, chain: Chain, deadline: float, parts: list[Part]) -> Lookup:
        if tier is None or not chain.hashes:
            return NOTHING
        try:
            found = tier.lookup(chain, deadline)
        except TierError as error:
            log.debug("lookup failed", extra={"fields": {"tier": tier.name, "error": str(error)}})
            return Lookup(0, complete=False)
        parts.append(Part(tier.name, found.length))
        return found


def _after(chain: Chain, length: int) -> Chain:
    return Chain(chain.namespace, chain.hashes[length:])


def _before(chain: Chain, length: int) -> Chain:
    return Chain(chain.namespace, chain.hashes[:length])
