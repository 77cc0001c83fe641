"""Read and write the objects of the control path: records that several nodes change, and others.

Records have optimistic locking by ETags. The server accepts a write only if the object has not
changed since it was read (`If-Match`), or does not exist (`If-None-Match: *`). Times come from the
server's headers, so nodes' clocks do not matter.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple, TypeVar

from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.auth import NO_FIELDS
from memkv_sglang.tiers.minio.http import (
    Connection,
    ProtocolError,
    ResponseHead,
    ServerClock,
    StatusError,
    TransferError,
    modified_time,
)
from memkv_sglang.tiers.minio.objects import ObjectClient, refuse
from memkv_sglang.tiers.minio.probe import Conditions

Answer = TypeVar("Answer")

LIMIT = 4 << 20
"""Maximum bytes of a record. This suffices for the hashes of a chain of 60,000 pages."""

CALL_SECONDS = 5.0
"""Maximum seconds for one request."""


class Record(NamedTuple):
    """A record as it was read."""

    content: bytes | None
    """Content of the record; None if it is larger than the limit."""
    version: str
    """The ETag."""
    written: float
    """When it was written, by the server's clock."""
    age: float
    """Whole seconds since then."""


class Records:
    """Reads and writes records. Calls block, and raise `TierError`."""

    def __init__(
        self,
        client: ObjectClient,
        storage_fields: Mapping[str, str],
        clock: ServerClock,
        *,
        conditions: Conditions = Conditions.QUOTED,
    ) -> None:
        """Store records in the client's bucket, with `storage_fields` in each PUT.

        With `Conditions.NONE`, writes always succeed. This is for servers that ignore conditions,
        with which only one node may write records.
        """
        self._client = client
        self._clock = clock
        self._storage_fields = storage_fields
        self._conditions = conditions

    def conditional(self, conditions: Conditions) -> "Records":
        """Return records of the same bucket, with the conditions that the server supports."""
        return Records(self._client, self._storage_fields, self._clock, conditions=conditions)

    def read(self, name: str, limit: int = LIMIT) -> Record | None:
        """Return a record; None if it does not exist. Leaves out content beyond `limit` bytes."""

        def read(connection: Connection, head: ResponseHead, deadline: float) -> Record:
            now, written = self._clock.now(head), modified_time(head)
            content = connection.read_body(limit, deadline)
            return Record(content, _etag(head), written, now - written)

        return self._get(name, read)

    def content(self, name: str, limit: int, span: tuple[int, int] | None = None) -> bytes | None:
        """Return the content of an object, or its bytes in `span`, [first, end).

        Returns None if the object does not exist, and nothing for content beyond `limit` bytes.
        """
        fields = {"range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}

        def read(connection: Connection, head: ResponseHead, deadline: float) -> bytes:
            with suppress(ProtocolError):
                self._clock.now(head)
            body = connection.read_body(limit, deadline) or b""
            if span and head.status == HTTPStatus.OK:  # the server ignores ranges
                return body[span[0] : span[1]]
            return body

        return self._get(name, read, fields)

    def _get(
        self,
        name: str,
        read: Callable[[Connection, ResponseHead, float], Answer],
        fields: Mapping[str, str] = NO_FIELDS,
    ) -> Answer | None:
        deadline = time.monotonic() + CALL_SECONDS

        def receive(connection: Connection, head: ResponseHead) -> Answer:
            if head.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                refuse(connection, head, deadline)
            return read(connection, head, deadline)

        try:
            return self._client.exchange("GET", name, deadline, receive, fields=lambda: fields)
        except StatusError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise TierError(f"MinIO refused to read {name}: {error}") from error
        except TransferError as error:
            raise TierError(f"could not read {name}: {error}") from error

    def clock(self, name: str) -> float:
        """Return the server's time, by which pages expire, in seconds since the epoch.

        Sends two requests for `name`, and returns the earliest of both times and this node's
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
            raise TierError(f"could not get MinIO's time: {error}") from error

    def now(self, name: str) -> float:
        """Read the object `name` and return the server's time. Raises `TierError`."""
        for _ in range(2):  # a second response may confirm the first one
            self.content(name, LIMIT)
            if (now := self._clock.reading()) is not None:
                return now
        raise TierError(f"could not get MinIO's time from {name}")

    def heads(self, names: Sequence[str], deadline: float) -> list[ResponseHead]:
        """Return the heads of objects, of status 200 or 404. Uses one connection."""
        try:
            return self._client.heads(names, deadline, ways=1)
        except (StatusError, TransferError) as error:
            raise TierError(f"could not check {len(names)} objects: {error}") from error

    def write(self, name: str, content: bytes, over: str | None) -> str | None:
        """Replace version `over` of a record, or create the record if `over` is None.

        Returns the new version. Returns None, and writes nothing, if the record was changed or
        created by another node.
        """
        if self._conditions is Conditions.NONE:
            return self._put(name, content, NO_FIELDS)
        return self._put(name, content, self._conditions.fields(over))

    def put(self, name: str, content: bytes) -> None:
        """Store an object that no other node writes."""
        if self._put(name, content, {}) is None:
            raise TierError(f"could not write {name}: the bucket is gone")

    def _put(self, name: str, content: bytes, condition: Mapping[str, str]) -> str | None:
        fields = {"content-length": str(len(content)), **condition, **self._storage_fields}
        deadline = time.monotonic() + CALL_SECONDS

        def receive(connection: Connection, head: ResponseHead) -> str:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline, "PUT")
            connection.discard_body(deadline)
            return _etag(head)

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
            # 404 means that the object was removed, so it has changed as well.
            if error.status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND) and (
                error.code != "NoSuchBucket"
            ):
                return None
            raise TierError(f"MinIO refused to write {name}: {error}") from error
        except TransferError as error:
            raise TierError(f"could not write {name}: {error}") from error


def _etag(head: ResponseHead) -> str:
    return (head.field(b"etag") or b"").decode("latin-1").strip('"')
