"""Small JSON objects that several nodes change: read and written with ETags as in S3.

A write goes through only if the object is as it was read (`If-Match`), or is not there
(`If-None-Match: *`); the server decides. Times are the server's own, from its headers, so that
nodes' clocks do not matter.
"""

import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import (
    Connection,
    ResponseHead,
    ServerClock,
    StatusError,
    TransferError,
    modified_time,
)
from memkv_sglang.tiers.minio.objects import ObjectClient, refuse

LIMIT = 4 << 20
"""Bytes of a record at most: the hashes of a chain of 60,000 pages."""

CALL_SECONDS = 5.0
"""Longest time for one request."""


class Record(NamedTuple):
    """An object as it was at one moment."""

    content: bytes | None
    """None if it is larger than asked for."""
    version: str
    """Its ETag."""
    age: float
    """Seconds since it was written, by the server's clock; whole ones."""


class Written(NamedTuple):
    """What a write left behind."""

    version: str
    versioned: bool
    """Whether the bucket keeps what was there before, as a version."""


class Records:
    """Calls block and raise `TierError`."""

    def __init__(
        self, client: ObjectClient, storage_fields: Mapping[str, str], clock: ServerClock
    ) -> None:
        """Keep records in the client's bucket; the fields tell the server how to keep them."""
        self._client = client
        self._clock = clock
        self._storage_fields = storage_fields

    def read(self, name: str, limit: int = LIMIT) -> Record | None:
        """Return a record, None if there is none; its content only up to `limit` bytes."""
        deadline = time.monotonic() + CALL_SECONDS

        def receive(connection: Connection, head: ResponseHead) -> Record:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline)
            age = self._clock.now(head) - modified_time(head)
            return Record(connection.read_body(limit, deadline), _etag(head), age)

        try:
            return self._client.exchange("GET", name, deadline, receive)
        except StatusError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise TierError(f"MinIO refused to read {name}: {error}") from error
        except TransferError as error:
            raise TierError(f"could not read {name}: {error}") from error

    def clock(self, name: str) -> float:
        """Return the time by which pages are removed, in seconds of the server's clock.

        Asks twice for any object, and returns the earliest of both answers and of this node's
        clock. Raises `TierError` if the time cannot be trusted.
        """
        deadline = time.monotonic() + CALL_SECONDS

        def receive(_: Connection, head: ResponseHead) -> float:
            return self._clock.earliest(head)

        try:
            return min(
                self._client.exchange("HEAD", name, deadline, receive, bodiless=True)
                for _ in range(2)
            )
        except (StatusError, TransferError) as error:
            raise TierError(f"could not ask MinIO for its time: {error}") from error

    def heads(self, names: Sequence[str], deadline: float) -> list[ResponseHead]:
        """Return the heads of objects, of status 200 or 404, over one connection."""
        try:
            return self._client.heads(names, deadline, ways=1)
        except (StatusError, TransferError) as error:
            raise TierError(f"could not look at {len(names)} objects: {error}") from error

    def write(self, name: str, content: bytes, over: str | None) -> Written | None:
        """Write a record over the version `over`, or None: where there is none.

        Returns None if the object is not, or no longer, as it should be; nothing was written then.
        """
        condition = {"if-match": f'"{over}"'} if over else {"if-none-match": "*"}
        fields = {"content-length": str(len(content)), **condition, **self._storage_fields}
        deadline = time.monotonic() + CALL_SECONDS

        def receive(connection: Connection, head: ResponseHead) -> Written:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline, "PUT")
            connection.discard_body(deadline)
            return Written(_etag(head), head.field(b"x-amz-version-id") is not None)

        try:
            return self._client.exchange(
                "PUT",
                name,
                deadline,
                receive,
                fields=lambda: fields,
                body=(memoryview(content),),
            )
        except StatusError as error:
            # A server that has lost the object says so; then it is not as it was read either.
            if error.status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND) and (
                error.code != "NoSuchBucket"
            ):
                return None
            raise TierError(f"MinIO refused to write {name}: {error}") from error
        except TransferError as error:
            raise TierError(f"could not write {name}: {error}") from error


def _etag(head: ResponseHead) -> str:
    return (head.field(b"etag") or b"").decode("latin-1").strip('"')
