"""A tier that hands every call on; a wrapper overrides the calls it cares for."""

import math
from collections.abc import Sequence

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, Lookup, SpillResult, Tier, TierUsage


class WrapperTier(Tier):
    """Has the contract, the name and the behaviour of the tier inside."""

    def __init__(self, inner: Tier) -> None:
        """Own `inner`: closing the wrapper closes it."""
        self.inner = inner
        self.name = inner.name

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Hand on."""
        return self.inner.lookup(chain, deadline)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Hand on."""
        return self.inner.present(keys, deadline)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Hand on."""
        return self.inner.fetch(pages, deadline)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Hand on."""
        return self.inner.spill(pages, deadline)

    def touch(self, chain: Chain) -> None:
        """Hand on."""
        self.inner.touch(chain)

    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """Hand on."""
        self.inner.invalidate(keys)

    def remove(self, keys: Sequence[PageKey]) -> int:
        """Hand on."""
        return self.inner.remove(keys)

    def clear(self, namespace: bytes) -> int:
        """Hand on."""
        return self.inner.clear(namespace)

    def describe(self, namespace: Namespace) -> None:
        """Hand on."""
        self.inner.describe(namespace)

    def namespaces(self) -> dict[bytes, Namespace]:
        """Hand on."""
        return self.inner.namespaces()

    def usage(self) -> TierUsage:
        """Hand on."""
        return self.inner.usage()

    def problem(self) -> str | None:
        """Hand on."""
        return self.inner.problem()

    def check_integrity(self) -> list[str]:
        """Hand on."""
        return self.inner.check_integrity()

    def close(self, deadline: float = math.inf) -> None:
        """Hand on."""
        self.inner.close(deadline)
