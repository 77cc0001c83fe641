"""The tier that all nodes share: one object per page in a MinIO bucket."""

from memkv_sglang.tiers.minio.tier import MinioTier

__all__ = ["MinioTier"]
