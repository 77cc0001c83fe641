"""The tier contract over shards in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.conformance import TierConformance, load, soon, spill
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.testing.state_machine import TierMachine
from memkv_sglang.tiers.base import Tier, TierUsage
from memkv_sglang.tiers.memory import MemoryTier
from tests.tiers.shards.sharded import make_shards, open_tier


class ShardedConformance(TierConformance):
    count = 3
    replicas = 1

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        self.shards = make_shards(self.count)
        self.open: Callable[[], Tier] = lambda: open_tier(self.shards, replicas=self.replicas)
        yield self.open()

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        return self.open()

    def stored_keys(self, tier: Tier) -> set[PageKey]:
        return set().union(*(shard.pages for shard in self.shards))

    def holders(self, key: PageKey) -> list[MemoryTier]:
        return [shard.memory for shard in self.shards if key in shard.pages]

    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        return self.holders(key)[0]._pages[key].content

    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        for memory in self.holders(key):
            memory._pages[key].content = content

    def usage(self, tier: Tier) -> TierUsage:
        """Return the usage without the second copies."""
        usage = tier.usage()
        return TierUsage(usage.pages // self.replicas, usage.bytes // self.replicas, None)


class TestOneShard(ShardedConformance):
    count = 1


class TestThreeShards(ShardedConformance):
    pass


class TestTwoReplicas(ShardedConformance):
    replicas = 2

    def test_clear_removes_only_one_namespace(self, tier: Tier) -> None:
        """As in the other tiers, but both copies count."""
        other = make_namespace(model="other")
        hashes = make_hashes(5)
        for namespace in (self.namespace, other):
            spill(tier, Chain(namespace.digest, hashes).keys())
        assert tier.clear(self.namespace.digest) == 10
        assert tier.lookup(Chain(self.namespace.digest, hashes), soon()).length == 0
        load(tier, Chain(other.digest, hashes).keys())


class ShardedMachine(TierMachine):
    replicas = 1

    def open(self) -> Tier:
        self.shards = make_shards(3)
        return open_tier(self.shards, replicas=self.replicas, cache=1000)

    def reopen(self, tier: Tier, *, cleanly: bool) -> Tier:
        if cleanly:
            tier.close()
        return open_tier(self.shards, replicas=self.replicas, cache=1000)


class ReplicatedMachine(ShardedMachine):
    replicas = 2


TestMachine: Any = ShardedMachine.TestCase
TestReplicatedMachine: Any = ReplicatedMachine.TestCase
TestMachine.settings = TestReplicatedMachine.settings = settings(max_examples=15)
