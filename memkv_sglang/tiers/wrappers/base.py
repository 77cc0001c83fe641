"""Base class of tier wrappers: forwards every call to the wrapped tier."""

import math
from collections.abc import Sequence

from typing_extensions import override

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import DiskStatus, Fetched, Lookup, SpillResult, Tier, TierUsage


class WrapperTier(Tier):
    """Forwards every call; subclasses override the calls they change."""

    def __init__(self, inner: Tier) -> None:
        """Wrap `inner`. Closing the wrapper closes `inner`."""
        self.inner = inner
        self.name = inner.name

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        return self.inner.lookup(chain, deadline)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        return self.inner.present(keys, deadline)

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        return self.inner.fetch(pages, deadline)

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        return self.inner.spill(pages, deadline)

    @override
    def touch(self, chain: Chain) -> None:
        self.inner.touch(chain)

    @override
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        self.inner.invalidate(keys)

    @override
    def remove(self, keys: Sequence[PageKey]) -> int:
        return self.inner.remove(keys)

    @override
    def clear(self, namespace: bytes) -> int:
        return self.inner.clear(namespace)

    @override
    def hide(self, namespace: bytes) -> int:
        return self.inner.hide(namespace)

    @override
    def describe(self, namespace: Namespace) -> None:
        self.inner.describe(namespace)

    @override
    def namespaces(self) -> dict[bytes, Namespace]:
        return self.inner.namespaces()

    @override
    def usage(self) -> TierUsage:
        return self.inner.usage()

    @override
    def problem(self) -> str | None:
        return self.inner.problem()

    @override
    def disks(self) -> list[DiskStatus]:
        return self.inner.disks()

    @override
    def check_integrity(self) -> list[str]:
        return self.inner.check_integrity()

    @override
    def close(self, deadline: float = math.inf) -> None:
        self.inner.close(deadline)
