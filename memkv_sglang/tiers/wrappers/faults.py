"""A tier that fails on purpose."""

from collections.abc import Callable, Sequence

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier, TierError
from memkv_sglang.tiers.wrappers.base import WrapperTier

FaultRule = Callable[[str, PageKey | None], bool]
"""Tells whether a call fails: given the verb and, for loads and spills, the page's key."""


class FaultyTier(WrapperTier):
    """Fails where its rule says so, the way a real medium does.

    A failed load leaves garbage in the page's buffers; lookups and `present` raise `TierError`.
    """

    def __init__(self, inner: Tier, rule: FaultRule) -> None:
        """Ask `rule` before every call."""
        super().__init__(inner)
        self.rule = rule

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Raise, or look up."""
        self._raise_if("lookup")
        return super().lookup(chain, deadline)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Raise, or ask."""
        self._raise_if("present")
        return super().present(keys, deadline)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load up to the first page that is to fail."""
        good = self._good("load", pages)
        outcomes = super().fetch(pages[:good], deadline)
        for page in pages[good : good + 1]:
            for buffer in page.buffers:
                buffer[:] = b"\xde" * len(buffer)
        return outcomes + [Fetched(LoadResult.FAILED)] * (len(pages) - good)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Spill up to the first page that is to fail."""
        good = self._good("spill", pages)
        results = super().spill(pages[:good], deadline)
        return results + [SpillResult.FAILED] * (len(pages) - good)

    def _good(self, verb: str, pages: Sequence[Page]) -> int:
        return next((i for i, page in enumerate(pages) if self.rule(verb, page.key)), len(pages))

    def _raise_if(self, verb: str) -> None:
        if self.rule(verb, None):
            raise TierError(f"{self.name}: {verb} failed on purpose")
