"""Records the use of pages in the bucket: moves an object's LastModified into the current period.

S3 can do this by copying an object onto itself with its own metadata, which MinIO does without
rewriting the content. `collector.order` explains how the collector uses these times, and why the
first page of a chain must be updated first.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from http import HTTPStatus
from urllib.parse import quote

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import (
    Connection,
    ResponseHead,
    StatusError,
    TransferError,
    refused,
    unusable_answer,
)
from memkv_sglang.tiers.minio.names import ObjectNames, is_stored, stores_page
from memkv_sglang.tiers.minio.objects import ObjectClient, Telemetry, refuse
from memkv_sglang.tiers.minio.retention.access_times import AccessTimeCache

log = logging.getLogger(__name__)

DELAY = 5.0
"""Seconds between a use and its update: the loads in between report most access times."""

WAITING_LIMIT = 200_000
"""Maximum number of queued pages; further uses are not recorded."""

CLOSE_SECONDS = 0.5
"""How long `close` waits for the current page, whose request may take `CALL_SECONDS`."""

CALL_SECONDS = 5.0
"""Maximum time for one page, in seconds."""

KEPT_FIELDS = ("x-amz-meta-", "x-amz-server-side-encryption", "content-type")
"""Prefixes of the header fields that a copy keeps."""


class AccessTimeUpdater:
    """Updates access times in the background, in one thread that sleeps half of the time."""

    def __init__(
        self,
        client: Callable[[], ObjectClient],
        bucket: str,
        names: ObjectNames,
        access_times: AccessTimeCache,
        telemetry: Telemetry,
        *,
        delay: float = DELAY,
    ) -> None:
        """Start the thread; `client` may block, and raise `TierError`."""
        self._client = client
        self._bucket = bucket
        self._names = names
        self._access_times = access_times
        self._telemetry = telemetry
        self._delay = delay
        self._chains: deque[tuple[float, Chain]] = deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memkv-access-times", daemon=True)
        self._thread.start()

    def record_access(self, chain: Chain) -> None:
        """Queue the pages of a chain, given root first, for an update; does not block."""
        unrecorded = [
            page for page in chain.hashes if not self._access_times.has(PageKey(chain[0], page))
        ]
        if not unrecorded:
            return
        with self._changed:
            if self._waiting + len(unrecorded) > WAITING_LIMIT:
                self._telemetry.count("uses_not_recorded", len(unrecorded))
                return
            self._waiting += len(unrecorded)
            due = time.monotonic() + self._delay
            self._chains.append((due, Chain(chain.namespace, unrecorded)))
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until the queue is empty; False if that takes more than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting == 0, timeout)

    def close(self) -> None:
        """Stop after the current page; wait `CLOSE_SECONDS` at most; idempotent."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (chain := self._next()) is not None:
            try:
                self._update_chain(chain)
            except (TierError, TransferError, StatusError) as error:
                self._telemetry.fault("use not recorded", error)
            except Exception:  # a bug must not end the thread
                log.exception("use not recorded")
            with self._changed:
                self._waiting -= len(chain.hashes)
                self._changed.notify_all()

    def _next(self) -> Chain | None:
        with self._changed:
            self._changed.wait_for(lambda: self._chains or self._closed.is_set())
            if self._closed.is_set():
                return None
            due, chain = self._chains.popleft()
        self._closed.wait(max(due - time.monotonic(), 0))
        return chain

    def _update_chain(self, chain: Chain) -> None:
        for key in chain.keys():
            if self._closed.is_set():
                return
            if not self._access_times.has(key):
                begin = time.monotonic()
                self._update(key)
                self._closed.wait(time.monotonic() - begin)

    def _update(self, key: PageKey) -> None:
        client, name = self._client(), self._names.page(key)
        deadline = time.monotonic() + CALL_SECONDS

        def receive(_: Connection, head: ResponseHead) -> ResponseHead:
            return head

        head = client.exchange("HEAD", name, deadline, receive, bodiless=True)
        if head.status == HTTPStatus.NOT_FOUND:  # not uploaded, or collected
            return
        if head.status != HTTPStatus.OK:
            raise refused(head, b"", "HEAD")
        if not stores_page(head) or not head.field(b"etag"):
            # A copy would replace the page's metadata by that of this response.
            raise unusable_answer(head)
        if self._access_times.saw(key, head):
            return
        fields = self._copy_fields(name, head)

        def confirm(connection: Connection, head: ResponseHead) -> None:
            if head.status != HTTPStatus.OK:
                refuse(connection, head, deadline, "PUT")
            if not is_stored(head, connection.discard_body(deadline)):
                raise unusable_answer(head)

        try:
            client.exchange("PUT", name, deadline, confirm, fields=lambda: fields)
        except StatusError as error:
            if error.status not in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND):
                raise
        else:
            self._access_times.stored(key)
            self._telemetry.count("access_times_updated")

    def _copy_fields(self, name: str, head: ResponseHead) -> Mapping[str, str]:
        etag = (head.field(b"etag") or b"").decode("latin-1")
        return {
            **kept_fields(head),
            "content-length": "0",
            "x-amz-copy-source": quote(f"/{self._bucket}/{name}"),
            "x-amz-copy-source-if-match": etag,  # never puts old metadata on new content
            "x-amz-metadata-directive": "REPLACE",
        }


def kept_fields(head: ResponseHead) -> dict[str, str]:
    """Return the header fields of an object that a copy must keep, in their original case."""
    fields = {}
    for line in head.original.decode("latin-1").split("\r\n")[1:]:
        name, _, value = (part.strip() for part in line.partition(":"))
        if name.lower().startswith(KEPT_FIELDS):
            fields[name.lower()] = value
    return fields
