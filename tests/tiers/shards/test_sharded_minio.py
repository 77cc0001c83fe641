"""The tier contract over two MinIO servers."""

from collections.abc import Iterator

import pytest
from memkv_testbed.minio_server import MinioServer
from minio import Minio

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.config.shards import shard_configs
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import Tier, TierUsage
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.shards import Shard, ShardedTier
from tests.tiers.minio.test_minio_conformance import TestMinioTier as OnOneServer


def open_sharded(config: MinioConfig) -> ShardedTier:
    tiers = {name: MinioTier(one) for name, one in shard_configs(config).items()}
    return ShardedTier(
        "minio",
        [Shard(name, tier, uses=tier, round_trip=tier.round_trip) for name, tier in tiers.items()],
        replicas=config.replicas,
        presence_cache_pages=1000,
        negative_ttl=config.negative_ttl,
    )


class TestShardedMinio(OnOneServer):
    """As on one server, with the pages of both buckets."""

    @pytest.fixture
    def tier(self, sharded_config: MinioConfig, servers: list[MinioServer]) -> Iterator[Tier]:
        self.sharded = sharded_config
        self.admins = [
            Minio(server.endpoint.partition("://")[2], *server.root, secure=False)
            for server in servers
        ]
        self.opened = [open_sharded(sharded_config)]
        yield self.opened[0]
        for tier in self.opened:
            tier.close()

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        self.opened.append(open_sharded(self.sharded))
        return self.opened[-1]

    def stored_keys(self, tier: Tier) -> set[PageKey]:
        keys: list[PageKey] = []
        self.config = self.sharded
        for admin in self.admins:
            self.admin = admin
            keys += super().stored_keys(tier)
        assert len(keys) == len(set(keys)), "a page is in both buckets"
        return set(keys)

    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        self._choose_server(key)
        return super().read_stored(tier, key)

    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        self._choose_server(key)
        super().write_stored(tier, key, content)

    def _choose_server(self, key: PageKey) -> None:
        self.config = self.sharded
        name = ObjectNames("").page(key)
        holders = [a for a in self.admins if list(a.list_objects(self.sharded.bucket, name))]
        (self.admin,) = holders

    def usage(self, tier: Tier) -> TierUsage:
        """Return the sum of what a collection of each bucket counts."""
        assert isinstance(tier, ShardedTier)
        assert tier.flush_accesses(60)
        usages = []
        for config in shard_configs(self.sharded).values():
            one = MinioTier(config)
            try:
                usages.append(super().usage(one))
            finally:
                one.close()
        return TierUsage(sum(u.pages for u in usages), sum(u.bytes for u in usages), None)
