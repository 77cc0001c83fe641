"""One tier over several NVMe directories, each on its own disk."""

from memkv_sglang.tiers.disks.tier import StripedTier

__all__ = ["StripedTier"]
