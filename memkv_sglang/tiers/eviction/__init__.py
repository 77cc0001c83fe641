"""Choose which pages a tier evicts, by computation in memory alone."""

from memkv_sglang.tiers.eviction.order import EvictionOrder
from memkv_sglang.tiers.eviction.policy_chooser import PolicyChooser
from memkv_sglang.tiers.eviction.victims import Victims

__all__ = ["EvictionOrder", "PolicyChooser", "Victims"]
