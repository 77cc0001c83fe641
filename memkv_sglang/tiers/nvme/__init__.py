"""The NVMe tier: preallocated segment files, slots with footers, and a journal."""

from memkv_sglang.tiers.nvme.catalog import SlotDescription
from memkv_sglang.tiers.nvme.tier import NvmeTier
from memkv_sglang.tiers.nvme.verify import VerifyReport

__all__ = ["NvmeTier", "SlotDescription", "VerifyReport"]
