"""The reference tier passes the conformance tests and evicts in the right order."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import TierConformance, load, soon, spill
from memkv_sglang.testing.pages import make_chain, make_namespace
from memkv_sglang.testing.state_machine import TierMachine
from memkv_sglang.tiers.base import SpillResult, Tier
from memkv_sglang.tiers.memory import MemoryTier


class TestMemoryTier(TierConformance):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        yield MemoryTier()

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        return tier

    def stored_keys(self, tier: Tier) -> set[PageKey]:
        assert isinstance(tier, MemoryTier)
        return set(tier._pages)

    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        assert isinstance(tier, MemoryTier)
        return tier._pages[key].content

    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        assert isinstance(tier, MemoryTier)
        tier._pages[key].content = content


class UnboundedMachine(TierMachine):
    capacity: int | None = None

    def open(self) -> Tier:
        self.pending_uploads = MemoryTier(self.capacity)
        return self.pending_uploads

    def reopen(self, tier: Tier, *, cleanly: bool) -> Tier:
        return tier


class BoundedMachine(UnboundedMachine):
    evicts = True
    capacity = 64 * 1024


TestUnbounded = UnboundedMachine.TestCase
TestBounded = BoundedMachine.TestCase
TestUnbounded.settings = TestBounded.settings = settings(max_examples=50)


def test_leaves_are_evicted_before_roots() -> None:
    namespace = make_namespace()
    tier = MemoryTier(capacity=8 * 8192)
    chain = make_chain(namespace, 6)
    spill(tier, chain.keys())
    tier.lookup(chain, soon())
    spill(tier, make_chain(namespace, 4, "newcomer").keys())
    assert tier.lookup(chain, soon()) == (4, True)


def test_pending_pages_are_not_evicted() -> None:
    namespace = make_namespace()
    tier = MemoryTier(capacity=4 * 8192)
    pending = make_chain(namespace, 2, "pending").keys()
    spill(tier, pending)
    tier.mark_pending(pending)
    newcomer = make_chain(namespace, 3, "newcomer").keys()
    assert spill(tier, newcomer[:2]) == [SpillResult.STORED] * 2
    tier.mark_pending(newcomer[:2])
    assert spill(tier, newcomer[2:]) == [SpillResult.REFUSED]
    load(tier, pending)
    assert [page.key for page in tier.pending()] == [*pending, *newcomer[:2]]
    tier.mark_uploaded(pending)
    assert spill(tier, newcomer[2:]) == [SpillResult.STORED]
    assert [page.key for page in tier.pending()] == newcomer[:2]
