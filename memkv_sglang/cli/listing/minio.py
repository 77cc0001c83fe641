"""The MinIO bucket as its objects' names tell it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from memkv_sglang.cli.checks.endpoint import demand_answer
from memkv_sglang.cli.listing.base import StoredPage
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PAGE_HASH_SIZE, PageKey
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.objects import ObjectNames

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.bucket import Bucket

_DIGITS = re.compile(f"[0-9a-f]{{{2 * PAGE_HASH_SIZE}}}")


@contextmanager
def open_minio(config: MinioConfig) -> Iterator[MinioTier]:
    """Open the tier without making a bucket, and close it."""
    tier = MinioTier(msgspec.structs.replace(config, create_bucket=False))
    try:
        yield tier
    finally:
        tier.close()


class MinioListing:
    """The pages of a bucket. Every call asks the server."""

    name = "minio"

    def __init__(self, config: MinioConfig, tier: MinioTier) -> None:
        """List the bucket behind a tier, which stays the caller's."""
        self._config = config
        self._tier = tier
        self._names = ObjectNames(config.prefix)
        self._bucket = open_bucket(config)

    def namespaces(self) -> dict[bytes, Namespace | None]:
        """Return the described namespaces; others cannot be told from foreign objects."""
        demand_answer(self._config)
        return {**self._tier.namespaces()}

    def pages(self, namespace: bytes) -> list[StoredPage]:
        """List a namespace's objects; their length is what the description tells."""
        return list(self._stored(namespace, self._names.namespace(namespace)))

    def find(self, key: PageKey) -> StoredPage | None:
        """Return a page, None if it is not there."""
        return next(self._stored(key.namespace, self._names.page(key)), None)

    def _stored(self, namespace: bytes, prefix: str) -> Iterator[StoredPage]:
        description = self._tier.namespaces().get(namespace)
        if description is None:
            return
        for name in self._bucket.names(prefix, recursive=True):
            digits = name.rpartition("/")[2]
            if _DIGITS.fullmatch(digits):
                key = PageKey(namespace, bytes.fromhex(digits))
                yield StoredPage(key, description.page_bytes, name)


def open_bucket(config: MinioConfig) -> "Bucket":
    """Return the bucket's control path. Imports minio-py, which is slow."""
    from memkv_sglang.tiers.minio.bucket import Bucket
    from memkv_sglang.tiers.minio.signing import credential_provider
    from memkv_sglang.tiers.minio.tls import tls_context

    return Bucket(config, credential_provider(config), tls_context(config))
