"""What may stay in the bucket: limits, the one node that sees to them, and what is kept anyway."""

from memkv_sglang.tiers.minio.retention.collector.collect import Collection, Collector
from memkv_sglang.tiers.minio.retention.collector.lease import Lease, LeaseHeldError

__all__ = ["Collection", "Collector", "Lease", "LeaseHeldError"]
