"""A wrapper that adds latency, for tests."""

import time
from collections.abc import Sequence

from typing_extensions import override

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, Lookup, SpillResult, Tier
from memkv_sglang.tiers.wrappers.base import WrapperTier


class SlowTier(WrapperTier):
    """Sleeps before every lookup, `present`, load and spill, even past the deadline."""

    def __init__(self, inner: Tier, seconds: float) -> None:
        """Wrap `inner`, delaying each of these calls by `seconds`."""
        super().__init__(inner)
        self.seconds = seconds

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        time.sleep(self.seconds)
        return super().lookup(chain, deadline)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        time.sleep(self.seconds)
        return super().present(keys, deadline)

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        time.sleep(self.seconds)
        return super().fetch(pages, deadline)

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        time.sleep(self.seconds)
        return super().spill(pages, deadline)
