"""The collector, which removes pages beyond the limits, and the lease that lets one node do so."""

from memkv_sglang.tiers.minio.retention.collector.collect import Collection, Collector
from memkv_sglang.tiers.minio.retention.collector.lease import Lease, LeaseHeldError

__all__ = ["Collection", "Collector", "Lease", "LeaseHeldError"]
