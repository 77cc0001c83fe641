"""Tiers around a tier: what cuts across all of them is composed, not built in."""

from memkv_sglang.tiers.wrappers.base import WrapperTier
from memkv_sglang.tiers.wrappers.counting import CountingTier
from memkv_sglang.tiers.wrappers.faults import FaultyTier
from memkv_sglang.tiers.wrappers.latency import SlowTier
from memkv_sglang.tiers.wrappers.measured import MeasuredTier

__all__ = ["CountingTier", "FaultyTier", "MeasuredTier", "SlowTier", "WrapperTier"]
