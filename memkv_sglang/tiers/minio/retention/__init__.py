"""Decide how long pages stay in the bucket: logs, the index, pins, and rounds of collection.

Nodes log which pages they store and use (`use_log`). A round of collection (`rounds`) merges the
logs into an index in shards (`shards`), decides which pages to remove (`eviction`), and removes
them (`collector`).
"""

from memkv_sglang.tiers.minio.retention.bucket_format import (
    BucketFormat,
    ensure_format,
    write_format,
)
from memkv_sglang.tiers.minio.retention.collector import Collection, Collector
from memkv_sglang.tiers.minio.retention.contents import namespace_entries
from memkv_sglang.tiers.minio.retention.logs import LogStore
from memkv_sglang.tiers.minio.retention.node import NodeRetention, OpenPath
from memkv_sglang.tiers.minio.retention.parts import ControlPath, Parts
from memkv_sglang.tiers.minio.retention.pins import KeptPages, Pin, PinStore
from memkv_sglang.tiers.minio.retention.rebuild import Rebuilder
from memkv_sglang.tiers.minio.retention.records import Records
from memkv_sglang.tiers.minio.retention.renewal import Renewer
from memkv_sglang.tiers.minio.retention.use_log import LogTarget, UseLog
from memkv_sglang.tiers.minio.retention.worker import CollectorWorker

__all__ = [
    "BucketFormat",
    "Collection",
    "Collector",
    "CollectorWorker",
    "ControlPath",
    "KeptPages",
    "LogStore",
    "LogTarget",
    "NodeRetention",
    "OpenPath",
    "Parts",
    "Pin",
    "PinStore",
    "Rebuilder",
    "Records",
    "Renewer",
    "UseLog",
    "ensure_format",
    "namespace_entries",
    "write_format",
]
