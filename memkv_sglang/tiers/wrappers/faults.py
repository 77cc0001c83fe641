"""A wrapper that injects faults, for tests."""

from collections.abc import Callable, Sequence

from typing_extensions import override

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier, TierError
from memkv_sglang.tiers.wrappers.base import WrapperTier

FaultRule = Callable[[str, PageKey | None], bool]
"""A rule that gets the operation and, for loads and spills, the page's key; returns whether to
fail."""


class FaultyTier(WrapperTier):
    """Fails the calls that a rule selects, in the way a real medium fails.

    A failed load leaves garbage in the page's buffers. A failed `lookup` or `present` raises
    `TierError`.
    """

    def __init__(self, inner: Tier, rule: FaultRule) -> None:
        """Wrap `inner`, evaluating `rule` before every call."""
        super().__init__(inner)
        self.rule = rule

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        self._raise_if_selected("lookup")
        return super().lookup(chain, deadline)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        self._raise_if_selected("present")
        return super().present(keys, deadline)

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        good = self._count_before_fault("load", pages)
        outcomes = super().fetch(pages[:good], deadline)
        for page in pages[good : good + 1]:
            for buffer in page.buffers:
                buffer[:] = b"\xde" * len(buffer)
        return outcomes + [Fetched(LoadResult.FAILED)] * (len(pages) - good)

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        good = self._count_before_fault("spill", pages)
        results = super().spill(pages[:good], deadline)
        return results + [SpillResult.FAILED] * (len(pages) - good)

    def _count_before_fault(self, operation: str, pages: Sequence[Page]) -> int:
        failing = (i for i, page in enumerate(pages) if self.rule(operation, page.key))
        return next(failing, len(pages))

    def _raise_if_selected(self, operation: str) -> None:
        if self.rule(operation, None):
            raise TierError(f"{self.name}: injected {operation} fault")
