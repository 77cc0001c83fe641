"""Make one of this project's tiers a contestant under the peers' contract."""

import time
from collections.abc import Sequence

from benchmarks.peers.base import Peer, PeerFailedError, demand
from memkv_sglang.page import Chain, Page
from memkv_sglang.tiers.base import LoadResult, SpillResult, Tier, TierError

PATIENCE = 120.0
"""Seconds per call. A benchmark can wait longer than a server."""


class Ours(Peer):
    """A contestant that owns the tier."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    def spill(self, pages: Sequence[Page]) -> None:
        """Spill all pages in one call."""
        results = self._tier.spill(pages, time.monotonic() + PATIENCE)
        demand(set(results) == {SpillResult.STORED}, self._tier.name)

    def load(self, pages: Sequence[Page]) -> None:
        """Load all pages in one call, which verifies every checksum."""
        results = self._tier.load(pages, time.monotonic() + PATIENCE)
        demand(set(results) == {LoadResult.LOADED}, self._tier.name)

    def lookup(self, chain: Chain) -> int:
        """Look the chain up. Raises `PeerFailedError` if time ran out."""
        found = self._tier.lookup(chain, time.monotonic() + PATIENCE)
        demand(found.complete, self._tier.name)
        return found.length

    def remove(self, pages: Sequence[Page]) -> None:
        """Remove from the tier."""
        try:
            self._tier.remove([page.key for page in pages])
        except TierError as error:
            raise PeerFailedError(str(error)) from error

    def close(self) -> None:
        """Close the tier."""
        self._tier.close()
