"""List pages in the bucket by their objects' names."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from memkv_sglang.cli.checks.endpoint import require_response
from memkv_sglang.cli.listing.base import StoredPage
from memkv_sglang.cli.shards import bucket_configs
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.admin.bucket import Bucket


@contextmanager
def open_minio(config: MinioConfig) -> Iterator[MinioTier]:
    """Open the tier without creating a bucket, and close it at the end."""
    tier = MinioTier(msgspec.structs.replace(config, create_bucket=False))
    try:
        yield tier
    finally:
        tier.close()


@contextmanager
def open_buckets(config: MinioConfig, shard: str | None = None) -> Iterator[dict[str, MinioTier]]:
    """Open the tier of every bucket, by shard, as `open_minio` does. Raises `ConfigError`."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(open_minio(one))
            for name, one in bucket_configs(config, shard).items()
        }


class MinioListing:
    """The pages in a bucket. Every call sends requests."""

    def __init__(self, config: MinioConfig, tier: MinioTier, name: str = "minio") -> None:
        """List the bucket of a tier, which the caller closes; `name` labels it in the output."""
        self.name = name
        self._config = config
        self._tier = tier
        self._names = ObjectNames(config.prefix)
        self._bucket = open_bucket(config)

    def namespaces(self) -> dict[bytes, Namespace | None]:
        """Return the namespaces with a description. Others could be foreign objects."""
        require_response(self._config)
        return {**self._described}

    @cached_property
    def _described(self) -> dict[bytes, Namespace]:
        return self._tier.namespaces()

    def pages(self, namespace: bytes) -> list[StoredPage]:
        """List a namespace's pages. Their length is the page size in its description."""
        return list(self._stored(namespace, self._names.namespace(namespace)))

    def find(self, key: PageKey) -> StoredPage | None:
        """Return a page, or None if it is not stored."""
        stored = self._stored(key.namespace, self._names.page(key))
        return next((page for page in stored if page.key == key), None)

    def _stored(self, namespace: bytes, prefix: str) -> Iterator[StoredPage]:
        description = self._described.get(namespace)
        if description is None:
            return
        for item in self._bucket.objects(prefix):
            key = self._names.page_key(item.name)
            if key is not None and key.namespace == namespace:
                yield StoredPage(key, description.page_bytes, item.name)


def open_bucket(config: MinioConfig) -> "Bucket":
    """Return the bucket's control path. Imports minio-py, which is slow."""
    from memkv_sglang.tiers.minio.admin.bucket import Bucket
    from memkv_sglang.tiers.minio.auth.signing import credential_provider
    from memkv_sglang.tiers.minio.http.tls import tls_context

    return Bucket(config, credential_provider(config), tls_context(config))
