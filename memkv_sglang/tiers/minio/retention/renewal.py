"""Renew pages that are in use before the bucket's lifecycle rule removes them by their age.

The object is copied onto itself with its own metadata, which updates its LastModified. If the
server does not update it, the page is read and stored again.
"""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from memkv_sglang.tiers.minio.auth import NO_FIELDS
from memkv_sglang.tiers.minio.http import (
    Connection,
    ProtocolError,
    ResponseHead,
    StatusError,
    TransferError,
    modified_time,
    refused,
)
from memkv_sglang.tiers.minio.names import ObjectNames, is_stored, stores_page
from memkv_sglang.tiers.minio.objects import ObjectClient, Telemetry, refuse

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.retention.entries import Entries

Answer = TypeVar("Answer")

DAY = 86400.0

SHARE = 0.75
"""Share of the lifecycle rule's days after which a page in use is renewed."""

PASS_LIMIT = 2000
"""Maximum number of pages renewed in a pass over a shard. The others wait for the next round."""

CALL_SECONDS = 5.0
"""Maximum seconds for one request."""

KEPT_FIELDS = ("x-amz-meta-", "x-amz-server-side-encryption", "content-type")
"""Prefixes of the header fields that a renewed object keeps."""

PAGE_LIMIT = 1 << 30
"""Maximum bytes of a page that is read and stored again."""


class Renewer:
    """Renews objects one by one. Calls block."""

    def __init__(
        self, client: ObjectClient, bucket: str, names: ObjectNames, telemetry: Telemetry
    ) -> None:
        """Renew the pages under the prefix of a bucket."""
        self._client = client
        self._bucket = bucket
        self._names = names
        self._telemetry = telemetry
        self._copies_move: bool | None = None
        """Whether a copy onto itself updates LastModified; None until it was tried."""

    def renew(self, found: "Entries", days: int, now: float) -> "Entries":
        """Renew the pages that are due and were used since they were written; return their entries.

        Leaves out pages that are gone. Failures are counted, and the next round tries again.
        """
        import numpy as np

        from memkv_sglang.tiers.minio.retention.entries import page_keys

        if not days or not len(found):
            return found
        written = found["written"].astype(np.int64)
        due = (written > 0) & (written < now - SHARE * days * DAY)
        due &= found["used"].astype(np.int64) > written + DAY
        places = np.flatnonzero(due)[:PASS_LIMIT]
        if not len(places):
            return found
        found = found.copy()
        left = np.ones(len(found), np.bool_)
        for place, key in zip(places.tolist(), page_keys(found[places]), strict=True):
            try:
                if self._renew(self._names.page(key)):
                    found[place]["written"] = int(now)
                    self._telemetry.count("renewed_pages")
                else:
                    left[place] = False
            except (StatusError, TransferError) as error:
                self._telemetry.fault("page not renewed", error)
        return found[left]

    def _renew(self, name: str) -> bool:
        """Update an object's LastModified. Returns False if the object is gone."""
        head = self._head(name)
        if head is None or not stores_page(head):
            return False
        if self._copies_move is not False and self._copy(name, head):
            if self._copies_move is None:
                after = self._head(name)
                self._copies_move = after is not None and modified_time(after) > modified_time(head)
            if self._copies_move:
                return True
        return self._store_again(name, head)

    def _head(self, name: str) -> ResponseHead | None:
        head = self._exchange("HEAD", name, lambda _connection, head, _deadline: head)
        if head.status == HTTPStatus.NOT_FOUND:
            return None
        if head.status != HTTPStatus.OK:
            raise refused(head, b"", "HEAD")
        return head

    def _copy(self, name: str, head: ResponseHead) -> bool:
        fields = {
            **kept_fields(head),
            "content-length": "0",
            "x-amz-copy-source": quote(f"/{self._bucket}/{name}"),
            "x-amz-copy-source-if-match": (head.field(b"etag") or b"").decode("latin-1"),
            "x-amz-metadata-directive": "REPLACE",
        }
        try:
            self._exchange("PUT", name, _confirm, fields)
        except StatusError as error:
            if error.status not in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND):
                raise
            return False
        return True

    def _store_again(self, name: str, head: ResponseHead) -> bool:
        def read(connection: Connection, head: ResponseHead, deadline: float) -> bytes:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline)
            body = connection.read_body(PAGE_LIMIT, deadline)
            if body is None:
                raise ProtocolError("the page is too large to be stored again")
            return body

        content = self._exchange("GET", name, read)
        fields = {**kept_fields(head), "content-length": str(len(content))}
        self._exchange("PUT", name, _confirm, fields, content)
        return True

    def _exchange(
        self,
        method: str,
        name: str,
        receive: Callable[[Connection, ResponseHead, float], Answer],
        fields: Mapping[str, str] = NO_FIELDS,
        body: bytes = b"",
    ) -> Answer:
        deadline = time.monotonic() + CALL_SECONDS
        return self._client.exchange(
            method,
            name,
            deadline,
            lambda connection, head: receive(connection, head, deadline),
            fields=lambda: fields,
            body=(memoryview(body),) if body else (),
            bodiless=method == "HEAD",
        )


def _confirm(connection: Connection, head: ResponseHead, deadline: float) -> None:
    if head.status != HTTPStatus.OK:
        refuse(connection, head, deadline, "PUT")
    if not is_stored(head, connection.discard_body(deadline)):
        raise ProtocolError("the server did not confirm that it stored the object")


def kept_fields(head: ResponseHead) -> dict[str, str]:
    """Return the header fields of an object that a renewal must keep, as they were written."""
    fields = {}
    for line in head.original.decode("latin-1").split("\r\n")[1:]:
        name, _, value = (part.strip() for part in line.partition(":"))
        if name.lower().startswith(KEPT_FIELDS):
            fields[name.lower()] = value
    return fields
