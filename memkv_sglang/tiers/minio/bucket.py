"""Everything about the bucket but its pages' bytes, through minio-py, which is imported late."""

import io
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.control_http import CONNECT_TIMEOUT, bounded_http
from memkv_sglang.tiers.minio.explain import PERMISSIONS, control_error

if TYPE_CHECKING:
    from minio import Minio
    from minio.sse import Sse
    from urllib3 import PoolManager

    from memkv_sglang.tiers.minio.credentials import RenewableProvider

Answer = TypeVar("Answer")

REFUSED = frozenset({400, 401, 403})
"""Statuses after which credentials may be wrong, withdrawn or expired (400)."""

LISTED_AT_ONCE = 1000
"""Objects of one answer, as many as S3 allows."""


class ObjectInfo(NamedTuple):
    """What a listing tells of an object."""

    name: str
    size: int
    """Bytes."""
    modified: float
    """When it was written or touched last, in seconds by the server's clock."""


ALREADY_MADE = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}


class Bucket:
    """The bucket's control path. All calls block and raise `TierError`."""

    def __init__(
        self, config: MinioConfig, provider: "RenewableProvider", context: ssl.SSLContext | None
    ) -> None:
        """Use the settings' endpoints in order, the next one where one cannot be reached."""
        self._name = config.bucket
        self._config = config
        self._provider = provider
        connect_timeout = min(config.connect_timeout, CONNECT_TIMEOUT)
        self._http = bounded_http(connect_timeout, context)
        self._clients = [
            _client(url, config, provider, self._http) for url in endpoint_urls(config)
        ]

    def ensure(self) -> None:
        """Make the bucket if it is not there. Raises `ConfigError` if that is not allowed."""
        if self._call("look for the bucket", lambda client: client.bucket_exists(self._name)):
            return
        if not self._config.create_bucket or self._config.role == "reader":
            raise ConfigError(
                f"minio.bucket: there is no bucket {self._name!r}; make it with `memkv bucket "
                "setup`, or let a writer make it with minio.create_bucket = true"
            )
        self._call("make the bucket", self._make)

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield every object under a prefix, a thousand by each request, in the order of names.

        Raises `TierError`, also in mid-way: a second server goes on where the first one failed.
        """
        last = ""
        while True:
            start = last

            def listing(client: "Minio", start: str = start) -> list[ObjectInfo]:
                found = client.list_objects(
                    self._name, prefix=prefix or None, recursive=True, start_after=start or None
                )
                return [
                    ObjectInfo(item.object_name, item.size or 0, item.last_modified.timestamp())
                    for item in islice(found, LISTED_AT_ONCE)
                    if item.object_name and item.last_modified
                ]

            batch = self._call("list objects", listing)
            yield from batch
            if len(batch) < LISTED_AT_ONCE:
                return
            last = batch[-1].name

    def names(self, prefix: str, *, recursive: bool) -> list[str]:
        """Return the names under a prefix; those of levels below end in a slash."""

        def listing(client: "Minio") -> list[str]:
            found = client.list_objects(self._name, prefix=prefix or None, recursive=recursive)
            return [item.object_name for item in found if item.object_name]

        return self._call("list objects", listing)

    def read(self, name: str) -> bytes | None:
        """Return an object's content, None if there is no such object."""
        from minio.error import S3Error

        def get(client: "Minio") -> bytes | None:
            try:
                with closing(client.get_object(self._name, name)) as response:
                    return response.read()
            except S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                raise

        return self._call("read an object", get)

    def write(self, name: str, content: bytes) -> bool:
        """Store an object; tell whether the bucket keeps versions."""
        result = self._call(
            "write an object",
            lambda client: client.put_object(
                self._name,
                name,
                io.BytesIO(content),
                len(content),
                "application/json",
                sse=_encryption(self._config),
            ),
        )
        return result.version_id is not None

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there count as removed."""
        from minio.deleteobjects import DeleteObject

        targets = [DeleteObject(name) for name in names]

        def delete(client: "Minio") -> list[str]:
            return [str(error.code) for error in client.remove_objects(self._name, targets)]

        if errors := self._call("remove objects", delete):
            raise TierError(
                f"MinIO did not remove {len(errors)} objects ({errors[0]}); allow s3:DeleteObject "
                "on minio.bucket, and see the server's log"
            )

    def administration(self) -> "Minio":
        """Return minio-py's client of the first server, for what an administrator does."""
        return self._clients[0]

    def close(self) -> None:
        """Close the idle connections; one in use is closed after its request."""
        self._http.clear()

    def _make(self, client: "Minio") -> None:
        from minio.error import S3Error

        try:
            client.make_bucket(self._name, self._config.region)
        except S3Error as error:
            if error.code not in ALREADY_MADE:  # else another node was faster
                raise

    def _call(self, what: str, operation: Callable[["Minio"], Answer]) -> Answer:
        from minio.error import MinioException, S3Error
        from urllib3.exceptions import HTTPError

        def attempt(client: "Minio") -> Answer:
            try:
                return operation(client)
            except S3Error as error:
                if error.response.status not in REFUSED:
                    raise
                self._provider.renew()  # which costs little where nothing can be new
                return operation(client)

        reason = "no endpoint"
        permission = PERMISSIONS.get(what, "")
        for url, client in zip(endpoint_urls(self._config), self._clients, strict=True):
            try:
                return attempt(client)
            except S3Error as error:
                reason = control_error(url, error, permission)
                raise TierError(f"MinIO refused to {what}: {reason}") from error
            except (HTTPError, MinioException, OSError, ValueError, SyntaxError) as error:
                reason = control_error(url, error, permission)
        raise TierError(f"could not {what}: {reason}")


def _encryption(config: MinioConfig) -> "Sse | None":
    from minio.sse import SseKMS, SseS3

    if config.sse == "none":
        return None
    return SseS3() if config.sse == "s3" else SseKMS(config.sse_kms_key, {})


def _client(
    url: str, config: MinioConfig, provider: "RenewableProvider", http: "PoolManager"
) -> "Minio":
    from minio import Minio

    scheme, _, netloc = url.partition("://")
    client = Minio(
        netloc.rstrip("/"),
        secure=scheme == "https",
        region=config.region,
        http_client=http,
        credentials=provider,
    )
    if config.addressing == "virtual":
        client.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]  # has no hints
    return client
