"""The parts of a bucket that collections, rebuilds and `clear` work with."""

from collections.abc import Callable
from typing import NamedTuple

from memkv_sglang.tiers.minio.admin import Bucket
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.objects import Telemetry
from memkv_sglang.tiers.minio.retention.bucket_format import BucketFormat
from memkv_sglang.tiers.minio.retention.logs import LogStore
from memkv_sglang.tiers.minio.retention.pins import PinStore
from memkv_sglang.tiers.minio.retention.records import Records
from memkv_sglang.tiers.minio.retention.renewal import Renewer

Step = Callable[[str, int, int | None], None]
"""Called after each step with the activity, the progress and the total (None if unknown).

May raise to end the collection, or sleep to slow it down.
"""


class ControlPath(NamedTuple):
    """What listings, the collector and pins need of an open bucket."""

    bucket: Bucket
    records: Records
    names: ObjectNames


class Parts(NamedTuple):
    """The parts of an open bucket."""

    bucket: Bucket
    records: Records
    names: ObjectNames
    logs: LogStore
    pins: PinStore
    renewer: Renewer
    telemetry: Telemetry
    format: BucketFormat
