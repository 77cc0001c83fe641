import io
from collections.abc import Callable

import pytest
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import TierConformance
from memkv_sglang.tiers.base import Tier
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames

METADATA = "x-amz-meta-"


class TestMinioTier(TierConformance):
    """The tier contract, against a real server."""

    @pytest.fixture
    def tier(
        self, minio_config: MinioConfig, admin: Minio, open_tier: Callable[[MinioConfig], MinioTier]
    ) -> Tier:
        self.config, self.admin, self.open_tier = minio_config, admin, open_tier
        return open_tier(minio_config)

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        return self.open_tier(self.config)

    def corrupt(self, tier: Tier, key: PageKey) -> None:
        name = ObjectNames(self.config.prefix).page(key)
        response = self.admin.get_object(self.config.bucket, name)
        content = bytearray(response.read())
        response.release_conn()
        content[len(content) // 2] ^= 1
        metadata: dict[str, str | list[str] | tuple[str]] = {
            field.lower().removeprefix(METADATA): value
            for field, value in response.headers.items()
            if field.lower().startswith(METADATA)
        }
        self.admin.put_object(
            self.config.bucket, name, io.BytesIO(content), len(content), metadata=metadata
        )
