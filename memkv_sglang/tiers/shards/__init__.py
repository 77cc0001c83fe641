"""The shared tier over several servers or clusters, each of which holds a share of the pages."""

from memkv_sglang.tiers.shards.placement import Placement
from memkv_sglang.tiers.shards.shard import Shard
from memkv_sglang.tiers.shards.tier import ShardedTier

__all__ = ["Placement", "Shard", "ShardedTier"]
