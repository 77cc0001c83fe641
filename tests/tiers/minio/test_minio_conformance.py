import io
from collections.abc import Callable

import pytest
from minio import Minio

from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import TierConformance
from memkv_sglang.tiers.base import Tier, TierUsage
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

    def stored_keys(self, tier: Tier) -> set[PageKey]:
        objects = self.admin.list_objects(self.config.bucket, recursive=True)
        names = [item.object_name or "" for item in objects]
        return {key for name in names if (key := self._names.page_key(name)) is not None}

    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        response = self.admin.get_object(self.config.bucket, self._names.page(key))
        try:
            return response.read()
        finally:
            response.close()
            response.release_conn()

    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        name = self._names.page(key)
        fields = self.admin.stat_object(self.config.bucket, name).metadata or {}
        metadata: dict[str, str | list[str] | tuple[str]] = {
            field.lower().removeprefix(METADATA): value
            for field, value in fields.items()
            if field.lower().startswith(METADATA)
        }
        self.admin.put_object(
            self.config.bucket, name, io.BytesIO(content), len(content), metadata=metadata
        )

    def usage(self, tier: Tier) -> TierUsage:
        """Return what a collection counts, as `MinioTier.usage` reports the last collection."""
        assert isinstance(tier, MinioTier)
        assert tier.flush_accesses(60)
        report = (
            tier.retention.collector(CollectorConfig())
            .collect(lambda *_: None, dry_run=True)
            .report
        )
        return TierUsage(report.pages, report.bytes, None)

    @property
    def _names(self) -> ObjectNames:
        return ObjectNames(self.config.prefix)
