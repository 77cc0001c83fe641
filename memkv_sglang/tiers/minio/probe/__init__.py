"""Find out what an S3 server supports, with a few small objects under the prefix `probe/`."""

from memkv_sglang.tiers.minio.probe.probe import probe_server
from memkv_sglang.tiers.minio.probe.support import Conditions, ServerSupport

__all__ = ["Conditions", "ServerSupport", "probe_server"]
