"""A wrapper that counts calls and results, for tests."""

from collections import Counter
from collections.abc import Sequence

from typing_extensions import override

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier
from memkv_sglang.tiers.wrappers.base import WrapperTier


class CountingTier(WrapperTier):
    """Counts calls by operation, and loaded and spilled pages by result."""

    def __init__(self, inner: Tier) -> None:
        """Wrap `inner` with all counts at zero."""
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.loads: Counter[LoadResult] = Counter()
        self.spills: Counter[SpillResult] = Counter()

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        self.calls["lookup"] += 1
        return super().lookup(chain, deadline)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        self.calls["present"] += 1
        return super().present(keys, deadline)

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        self.calls["load"] += 1
        outcomes = super().fetch(pages, deadline)
        self.loads.update(fetched.result for fetched in outcomes)
        return outcomes

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        self.calls["spill"] += 1
        results = super().spill(pages, deadline)
        self.spills.update(results)
        return results
