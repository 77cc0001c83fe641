"""Wrappers that add one cross-cutting concern to any tier, such as metrics or injected faults."""

from memkv_sglang.tiers.wrappers.base import WrapperTier
from memkv_sglang.tiers.wrappers.counting import CountingTier
from memkv_sglang.tiers.wrappers.faults import FaultyTier
from memkv_sglang.tiers.wrappers.latency import SlowTier

__all__ = ["CountingTier", "FaultyTier", "SlowTier", "WrapperTier"]
