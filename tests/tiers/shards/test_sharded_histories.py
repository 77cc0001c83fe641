"""Random histories of spills, loads and lookups while shards fail, return, come and go."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.conformance import LENGTHS, soon
from memkv_sglang.testing.pages import holds_content, make_hashes, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult, TierError
from memkv_sglang.tiers.shards import Placement, ShardedTier
from tests.tiers.shards.sharded import MemoryShard, open_tier

NAMESPACE = make_namespace(page_bytes=sum(LENGTHS))
TRUNK = make_hashes(24, "trunk")
CHAINS = [TRUNK, [*TRUNK[:9], *make_hashes(15, "branch", TRUNK[8])]]
MAX_SHARDS = 5

numbers = st.integers(0, MAX_SHARDS - 1)
prefixes = st.builds(
    lambda chain, length: Chain(NAMESPACE.digest, CHAINS[chain][:length]),
    st.integers(0, len(CHAINS) - 1),
    st.integers(1, 24),
)


class ShardedHistory(RuleBasedStateMachine):
    replicas = 1

    @initialize(count=st.integers(2, 4))
    def begin(self, count: int) -> None:
        self.added = count
        self.shards = [MemoryShard(f"s{number}") for number in range(count)]
        self.reopen()

    def reopen(self) -> None:
        """Restart the agent, with the shards that are configured now."""
        replicas = min(self.replicas, len(self.shards))
        self.tier: ShardedTier = open_tier(self.shards, replicas=replicas, cache=1000)

    def can_load(self, key: PageKey) -> bool:
        """Return whether one of the first two shards that seem to work has the page."""
        order = Placement([shard.name for shard in self.shards]).order(key)
        seem = [self.shards[number] for number in order if not self.shards[number].is_known_down]
        return any(key in shard.pages and not shard.is_down for shard in seem[:2])

    def loadable(self, chain: Chain) -> int:
        keys = chain.keys()
        return next((i for i, key in enumerate(keys) if not self.can_load(key)), len(keys))

    @rule(chain=prefixes)
    def spill(self, chain: Chain) -> None:
        keys = chain.keys()
        results = self.tier.spill([make_page(key, LENGTHS, filled=True) for key in keys], soon())
        surprises = sum(shard.is_down and not shard.is_known_down for shard in self.shards)
        working = sum(not shard.is_down for shard in self.shards)
        if working and surprises == 0:
            assert set(results) <= {SpillResult.STORED, SpillResult.PRESENT}
        for key, result in zip(keys, results, strict=True):
            if result <= SpillResult.PRESENT:
                assert any(key in shard.pages for shard in self.shards)
        if SpillResult.FAILED not in results:
            self.load(chain)

    @rule(chain=prefixes)
    def load(self, chain: Chain) -> None:
        pages = [make_page(key, LENGTHS, filled=False) for key in chain.keys()]
        expected = self.loadable(chain)
        results = self.tier.load(pages, soon())
        assert all(
            holds_content(page)
            for page, result in zip(pages, results, strict=True)
            if result is LoadResult.LOADED
        )
        loaded = [result is LoadResult.LOADED for result in [*results, LoadResult.MISSING]]
        assert loaded.index(False) >= expected

    @rule(chain=prefixes)
    def lookup(self, chain: Chain) -> None:
        try:
            found = self.tier.lookup(chain, soon())
        except TierError:
            assert all(shard.is_down for shard in self.shards)
            return
        if found.complete:
            assert found.length >= self.loadable(chain)

    @rule(number=numbers, noticed=st.booleans())
    def kill(self, number: int, noticed: bool) -> None:
        self.shards[number % len(self.shards)].kill(noticed=noticed)

    @rule(number=numbers)
    def restore(self, number: int) -> None:
        self.shards[number % len(self.shards)].restore()

    @precondition(lambda self: len(self.shards) < MAX_SHARDS)
    @rule()
    def add(self) -> None:
        self.shards.append(MemoryShard(f"s{self.added}"))
        self.added += 1
        self.reopen()

    @precondition(lambda self: len(self.shards) > 1)
    @rule(number=numbers)
    def remove(self, number: int) -> None:
        del self.shards[number % len(self.shards)]
        self.reopen()

    @rule()
    def restart(self) -> None:
        self.reopen()

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def structures_agree(self) -> None:
        assert self.tier.check_integrity() == []


class ReplicatedHistory(ShardedHistory):
    replicas = 2


TestHistory: Any = ShardedHistory.TestCase
TestReplicatedHistory: Any = ReplicatedHistory.TestCase
TestHistory.settings = TestReplicatedHistory.settings = settings(max_examples=20)
