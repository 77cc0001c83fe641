"""A tier that takes its time."""

import time
from collections.abc import Sequence

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, Lookup, SpillResult, Tier
from memkv_sglang.tiers.wrappers.base import WrapperTier


class SlowTier(WrapperTier):
    """Waits `seconds` before each call that moves pages or asks for them, deadline or not."""

    def __init__(self, inner: Tier, seconds: float) -> None:
        """Delay every call by `seconds`."""
        super().__init__(inner)
        self.seconds = seconds

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Wait, then look up."""
        time.sleep(self.seconds)
        return super().lookup(chain, deadline)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Wait, then ask."""
        time.sleep(self.seconds)
        return super().present(keys, deadline)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Wait, then load."""
        time.sleep(self.seconds)
        return super().fetch(pages, deadline)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Wait, then spill."""
        time.sleep(self.seconds)
        return super().spill(pages, deadline)
