"""Sharded tiers over memory, whose shards can be switched off."""

from collections.abc import Sequence

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import Tier
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.shards import Shard, ShardedTier
from memkv_sglang.tiers.wrappers import CountingTier, FaultyTier


class MemoryShard:
    """A shard in memory. While it is down, every call fails."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory = MemoryTier(name=name)
        self.counting = CountingTier(self.memory)
        self.is_down = False
        self.is_known_down = False
        """Whether a circuit breaker for this shard would be open."""

    @property
    def pages(self) -> set[PageKey]:
        return set(self.memory._pages)

    def shard(self) -> Shard:
        tier: Tier = FaultyTier(self.counting, lambda *_: self.is_down)
        return Shard(self.name, tier, works=lambda: not self.is_known_down)

    def kill(self, *, noticed: bool = True) -> None:
        self.is_down, self.is_known_down = True, noticed

    def restore(self) -> None:
        self.is_down = self.is_known_down = False


def make_shards(count: int) -> list[MemoryShard]:
    return [MemoryShard(f"s{number}") for number in range(count)]


def open_tier(shards: Sequence[MemoryShard], *, replicas: int = 1, cache: int = 0) -> ShardedTier:
    return ShardedTier(
        "memory",
        [shard.shard() for shard in shards],
        replicas=replicas,
        presence_cache_pages=cache,
    )
