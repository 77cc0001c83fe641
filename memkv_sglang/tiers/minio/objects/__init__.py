"""Signed requests for objects: one at a time, pipelined, and in bulk."""

from memkv_sglang.tiers.minio.objects.client import (
    UNGUARDED,
    Guard,
    ObjectClient,
    refuse,
)
from memkv_sglang.tiers.minio.objects.telemetry import (
    LOAD_FAILED,
    LOOKUP_FAILED,
    SPILL_FAILED,
    Telemetry,
)

__all__ = [
    "LOAD_FAILED",
    "LOOKUP_FAILED",
    "SPILL_FAILED",
    "UNGUARDED",
    "Guard",
    "ObjectClient",
    "Telemetry",
    "refuse",
]
