"""A tier that counts what is asked of it."""

from collections import Counter
from collections.abc import Sequence

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier
from memkv_sglang.tiers.wrappers.base import WrapperTier


class CountingTier(WrapperTier):
    """Counts calls by verb and pages by verb and result."""

    def __init__(self, inner: Tier) -> None:
        """Start from zero."""
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.loads: Counter[LoadResult] = Counter()
        self.spills: Counter[SpillResult] = Counter()

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Count, then look up."""
        self.calls["lookup"] += 1
        return super().lookup(chain, deadline)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Count, then ask."""
        self.calls["present"] += 1
        return super().present(keys, deadline)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load, then count the results."""
        self.calls["load"] += 1
        outcomes = super().fetch(pages, deadline)
        self.loads.update(fetched.result for fetched in outcomes)
        return outcomes

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Spill, then count the results."""
        self.calls["spill"] += 1
        results = super().spill(pages, deadline)
        self.spills.update(results)
        return results
