"""Which pages leave a tier first. Memory only: no files, no sockets, nothing that blocks."""

from memkv_sglang.tiers.eviction.order import EvictionOrder
from memkv_sglang.tiers.eviction.victims import Victims

__all__ = ["EvictionOrder", "Victims"]
