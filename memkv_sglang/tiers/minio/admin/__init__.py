"""The control path: bucket, lifecycle rule and policies."""

from memkv_sglang.tiers.minio.admin.bucket import REMOVED_AT_ONCE, Bucket, ObjectInfo
from memkv_sglang.tiers.minio.admin.policy import node_policy
from memkv_sglang.tiers.minio.admin.setup import read_features, set_up

__all__ = ["REMOVED_AT_ONCE", "Bucket", "ObjectInfo", "node_policy", "read_features", "set_up"]
