"""How long pages stay in the bucket: access times, pins, and the collector with its lease."""

from memkv_sglang.tiers.minio.retention.access_time_updater import DELAY, AccessTimeUpdater
from memkv_sglang.tiers.minio.retention.access_times import AccessTimeCache
from memkv_sglang.tiers.minio.retention.collector import Collector, Lease
from memkv_sglang.tiers.minio.retention.collector.worker import CollectorWorker
from memkv_sglang.tiers.minio.retention.pins import KeptPages, Pin, PinStore
from memkv_sglang.tiers.minio.retention.records import Records

__all__ = [
    "DELAY",
    "AccessTimeCache",
    "AccessTimeUpdater",
    "Collector",
    "CollectorWorker",
    "KeptPages",
    "Lease",
    "Pin",
    "PinStore",
    "Records",
]
