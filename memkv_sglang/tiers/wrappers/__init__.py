"""Wrappers that add one thing, such as metrics or injected faults, to any tier."""

from memkv_sglang.tiers.wrappers.base import WrapperTier
from memkv_sglang.tiers.wrappers.counting import CountingTier
from memkv_sglang.tiers.wrappers.faults import FaultyTier
from memkv_sglang.tiers.wrappers.latency import SlowTier

__all__ = ["CountingTier", "FaultyTier", "SlowTier", "WrapperTier"]
