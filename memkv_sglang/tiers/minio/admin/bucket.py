"""The control path of the bucket, through minio-py, which is slow and imported late."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from http import HTTPStatus
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.auth import REFUSED
from memkv_sglang.tiers.minio.http import PERMISSIONS, control_error, shown

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Object
    from minio.error import S3Error
    from minio.sse import Sse

    from memkv_sglang.tiers.minio.auth.credentials import RenewableProvider
    from memkv_sglang.tiers.minio.http.control import ControlHttp
    from memkv_sglang.tiers.minio.http.tls import ContextSource

Answer = TypeVar("Answer")

LISTED_AT_ONCE = 1000
"""Number of objects per listing request; S3's maximum."""

REMOVED_AT_ONCE = 1000
"""Number of objects per delete request; S3's maximum."""

REMOVE_SECONDS = 10.0
"""Seconds for a delete request, which is many operations for the server."""

SMALLEST_PART = 5 << 20
"""Minimum bytes of a part if an object is uploaded in several parts."""

LARGEST = 5 << 40
"""Maximum size of an object in S3, in bytes."""

READ_LIMIT = 64 << 10
"""Maximum bytes of an object that is read as a whole, unless the caller sets a limit."""

HEAD_ROOM = 64 << 10
"""Bytes of a response beyond the requested ones: its head, and more if a server ignores the range.
"""

REASON_LIMIT = 300
"""Maximum characters of a server's reason that are quoted."""


class ObjectInfo(NamedTuple):
    """An object in a listing."""

    name: str
    size: int
    """Bytes."""
    modified: float
    """Unix time of the last modification, by the server's clock."""
    etag: str = ""
    """ETag of the object, which changes with each write."""


OFF = "Off"
"""minio-py's name for the versioning of a bucket that never kept versions."""

REGION_FIELD = "x-amz-bucket-region"
"""Header field in which some servers name the bucket's region."""

UNSUPPORTED = {HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED}
UNSUPPORTED_CODES = {"NotImplemented", "MethodNotAllowed"}

ALREADY_MADE = {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}


class Bucket:
    """Creates, lists, reads and deletes through minio-py. Calls block, and raise `TierError`."""

    def __init__(
        self, config: MinioConfig, provider: "RenewableProvider", context: "ContextSource | None"
    ) -> None:
        """Use the first reachable endpoint of the settings."""
        self._name = config.bucket
        self._config = config
        self._provider = provider
        from memkv_sglang.tiers.minio.http.control import CONNECT_TIMEOUT, ControlHttp

        self._http = ControlHttp(min(config.connect_timeout, CONNECT_TIMEOUT), context)
        self._clients = [
            _client(url, config, provider, self._http) for url in endpoint_urls(config)
        ]

    def ensure(self) -> None:
        """Create the bucket if it does not exist. Raises `ConfigError` if that is not allowed."""
        if self._call("look for the bucket", lambda client: bucket_exists(client, self._name)):
            return
        if not self._config.create_bucket or self._config.role == "reader":
            raise ConfigError(
                f"minio.bucket: there is no bucket {self._name!r}; make it with `memkv bucket "
                "setup`, or let a writer make it with minio.create_bucket = true"
            )
        self._call("make the bucket", self._make)

    def objects(
        self, prefix: str, past: Callable[[str], str] = lambda name: name
    ) -> Iterator[ObjectInfo]:
        """Yield all objects under a prefix in the order of names, 1,000 per request.

        `past` maps the last name of a request to the name after which the next request starts.
        If a server fails, the next one continues the listing. May raise `TierError` at any item.
        """
        yield from filter(None, map(_info, self._listing(prefix, recursive=True, past=past)))

    def names(self, prefix: str, *, recursive: bool) -> list[str]:
        """Return the names under a prefix; names of folders end in a slash."""
        return [item.object_name or "" for item in self._listing(prefix, recursive=recursive)]

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names of the folders directly under a prefix, without the slash."""
        for item in self._listing(prefix, recursive=False):
            name = item.object_name or ""
            if item.is_dir and name.endswith("/"):
                yield name.removeprefix(prefix).removesuffix("/")

    def _listing(
        self,
        prefix: str,
        *,
        recursive: bool,
        past: Callable[[str], str] = lambda name: name,
    ) -> Iterator["Object"]:
        start = ""
        while True:
            page = partial(_page, self._name, prefix, start, recursive)
            batch = self._call("list objects", page)
            yield from (item for item in batch if (item.object_name or "").startswith(prefix))
            if len(batch) < LISTED_AT_ONCE:
                return
            last = max(item.object_name or "" for item in batch)
            if last <= start:
                raise TierError(f"MinIO lists no object after {shown(start)!r} and more of them")
            start = past(last)

    def read(self, name: str, limit: int = READ_LIMIT) -> bytes | None:
        """Return the content of an object, None if it does not exist.

        If it is larger than `limit`, returns the first `limit + 1` bytes.
        """
        from minio.error import S3Error

        def get(client: "Minio") -> bytes | None:
            try:
                answer = client.get_object(self._name, name, length=limit + 1)
            except S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                if error.code == "InvalidRange":  # an empty object has no first byte
                    return b""
                raise
            with closing(answer) as response:
                content: bytes = response.read()
                return content

        return self._call("read an object", get, size=limit + HEAD_ROOM)

    def write(self, name: str, content: bytes) -> None:
        """Store an object. Like a page, it takes one request, whatever its size."""
        self._call(
            "write an object",
            lambda client: client.put_object(
                self._name,
                name,
                io.BytesIO(content),
                len(content),
                "application/json",
                sse=_encryption(self._config),
                part_size=max(len(content), SMALLEST_PART),
            ),
        )

    def remove(self, names: Iterable[str], seconds: float = REMOVE_SECONDS) -> None:
        """Delete objects, ignoring missing ones. Each request takes at most `seconds`."""
        from minio.deleteobjects import DeleteObject

        targets = [DeleteObject(name) for name in names]

        def delete(some: list[DeleteObject], client: "Minio") -> list[str]:
            return [str(error.code) for error in client.remove_objects(self._name, some)]

        for first in range(0, len(targets), REMOVED_AT_ONCE):
            some = targets[first : first + REMOVED_AT_ONCE]
            if errors := self._call("remove objects", partial(delete, some), seconds=seconds):
                raise TierError(
                    f"MinIO did not remove {len(errors)} objects ({shown(errors[0])}); allow "
                    "s3:DeleteObject on minio.bucket, and see the server's log"
                )

    def versioning(self) -> str | None:
        """Return `Off`, `Enabled` or `Suspended`; None if these credentials may not ask."""
        from minio.error import S3Error

        def get(client: "Minio") -> str | None:
            try:
                return client.get_bucket_versioning(self._name).status or OFF
            except S3Error as error:
                if is_unsupported(error):
                    return OFF
                if error.response.status == HTTPStatus.FORBIDDEN:
                    return None
                raise

        return self._call("read the bucket's versioning", get)

    def administration(self) -> "Minio":
        """Return minio-py's client for the first server, for administrative calls."""
        return self._clients[0]

    def close(self) -> None:
        """Close the connections. Calls in flight raise at once."""
        self._http.close()

    def _make(self, client: "Minio") -> None:
        from minio.error import S3Error

        try:
            client.make_bucket(self._name, self._config.region)
        except S3Error as error:
            if error.code not in ALREADY_MADE:  # another node may have just created it
                raise

    def _call(
        self,
        what: str,
        operation: Callable[["Minio"], Answer],
        *,
        seconds: float | None = None,
        size: int | None = None,
    ) -> Answer:
        from minio.error import S3Error

        from memkv_sglang.tiers.minio.http.control import ANSWER_LIMIT, REQUEST_SECONDS

        def attempt(client: "Minio") -> Answer:
            try:
                return operation(client)
            except S3Error as error:
                if error.response.status not in REFUSED:
                    raise
                self._provider.renew()  # this is cheap if the source has nothing new
                return operation(client)

        reason = "no endpoint"
        permission = PERMISSIONS.get(what, "")
        for url, client in zip(endpoint_urls(self._config), self._clients, strict=True):
            limits = self._http.limits(seconds or REQUEST_SECONDS, size or ANSWER_LIMIT)
            try:
                with limits:
                    return attempt(client)
            except S3Error as error:
                reason = shown(control_error(url, error, permission), REASON_LIMIT)
                raise TierError(f"MinIO refused to {what}: {reason}") from error
            # minio-py raises many types of exceptions for malformed responses
            except Exception as error:
                reason = shown(control_error(url, error, permission), REASON_LIMIT)
        raise TierError(f"could not {what}: {reason}")


def bucket_exists(client: "Minio", name: str) -> bool:
    """Return whether a bucket exists. Raises `S3Error`, with the server's reason."""
    from minio.error import InvalidResponseError, S3Error

    try:
        return client.bucket_exists(name)
    except S3Error as error:
        if error.response.status in REFUSED and REGION_FIELD not in error.response.headers:
            # A response to a HEAD has no body, so it does not say what is wrong. A response to a
            # GET does.
            with suppress(InvalidResponseError):
                next(client.list_objects(name), None)
        raise


def is_unsupported(error: "S3Error") -> bool:
    """Return whether a server refused a request because it lacks the feature."""
    return error.response.status in UNSUPPORTED or error.code in UNSUPPORTED_CODES


def _page(bucket: str, prefix: str, start: str, recursive: bool, client: "Minio") -> "list[Object]":
    """Return the next objects of a listing: fewer than `LISTED_AT_ONCE` at the end."""
    found = client.list_objects(
        bucket, prefix=prefix or None, recursive=recursive, start_after=start or None
    )
    return list(islice(found, LISTED_AT_ONCE))


def _info(item: "Object") -> ObjectInfo | None:
    """Return an object of a listing; None if its fields are implausible."""
    name, size, modified = item.object_name, item.size, item.last_modified
    if not name or modified is None or size is None or not 0 <= size <= LARGEST:
        return None
    return ObjectInfo(name, size, modified.timestamp(), item.etag or "")


def _encryption(config: MinioConfig) -> "Sse | None":
    from minio.sse import SseKMS, SseS3

    if config.sse == "none":
        return None
    return SseS3() if config.sse == "s3" else SseKMS(config.sse_kms_key, {})


def _client(
    url: str, config: MinioConfig, provider: "RenewableProvider", http: "ControlHttp"
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
        client.enable_virtual_style_endpoint()  # type: ignore[no-untyped-call]  # untyped
    return client
