"""One page up or down: what each answer of the server means for it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote

from memkv_sglang.page import Page, PageKey, page_checksum
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio.batch import Guard
from memkv_sglang.tiers.minio.bulk.base import Response
from memkv_sglang.tiers.minio.bulk.reader import BulkAnswer
from memkv_sglang.tiers.minio.client import NO_FIELDS, UNGUARDED, ObjectClient, refuse
from memkv_sglang.tiers.minio.connection import Connection
from memkv_sglang.tiers.minio.errors import (
    ProtocolError,
    StatusError,
    TransferError,
    UnreadableError,
)
from memkv_sglang.tiers.minio.forms import PageForm
from memkv_sglang.tiers.minio.knowledge import Knowledge
from memkv_sglang.tiers.minio.noted import NotedPages
from memkv_sglang.tiers.minio.objects import (
    ObjectNames,
    checksum_matches,
    metadata_mismatch,
    page_fields,
    plainly_matches,
)
from memkv_sglang.tiers.minio.telemetry import LOAD_FAILED, SPILL_FAILED, Telemetry
from memkv_sglang.tiers.minio.wire import ResponseHead, framed_head, parse_head

ANOTHER_COPY = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND)
"""Answers to the copy of an object that is not, or no longer, the one that was read."""

OVER_QUOTA = "XMinioAdminBucketQuotaExceeded"
"""What MinIO answers where the bucket's quota is used up."""

logger = logging.getLogger(__name__)


class _Fault(NamedTuple):
    """What is wrong with a response that should be a page, and what tells it from others."""

    reason: str
    etag: bytes | None
    content: bytes = b""
    """The body's checksum; empty where it was not read."""


NOTHING_SEEN: Mapping[PageKey, _Fault] = {}


class FetchedPages(NamedTuple):
    """What became of pages that were loaded at once; the rest are for `fetch`."""

    loaded: list[bool]
    faults: Mapping[PageKey, _Fault]
    """What was wrong with those that came."""
    failure: TransferError | None
    """Why the rest need not be tried, None if they should be."""


class PageTransfers(NamedTuple):
    """Moves pages of one bucket and keeps what it learns. Faults are results and a log line."""

    client: ObjectClient
    bulk: Callable[[Sequence[tuple[str, Page]], float], BulkAnswer]
    """`BulkReader.read` with a signer."""
    bucket: str
    names: ObjectNames
    knowledge: Knowledge
    telemetry: Telemetry
    form: PageForm
    storage_fields: Mapping[str, str]
    """Header fields that tell the server how to keep what it is given."""
    on_bucket_lost: Callable[[], None]
    read_only: bool = False
    noted: Callable[[], NotedPages | None] = lambda: None
    """Who is told when the pages' objects were written last, if anybody."""

    def fetch_all(self, pages: Sequence[Page], deadline: float) -> FetchedPages:
        """Load pages at once as far as each comes as it should, see `BulkReader`."""
        loaded, faults = [False] * len(pages), dict[PageKey, _Fault]()
        if not self.form.in_place:
            return FetchedPages(loaded, faults, None)
        objects = [(self.names.page(page.key), page) for page in pages]
        responses, failure = self.bulk(objects, deadline)
        for response in responses:
            page = pages[response.number]
            try:
                fault = self._judge(page, response)
            except (ProtocolError, UnreadableError):
                continue
            except Exception:
                logger.exception("response not judged")
                continue
            if fault is None:
                loaded[response.number] = True
            else:
                faults[page.key] = fault
        return FetchedPages(loaded, faults, failure)

    def _judge(self, page: Page, response: Response) -> _Fault | None:
        head = framed_head(response.head, page.length)
        if plainly_matches(head, page, response.checksum):
            self._take_note(page, head)
            return None
        head = parse_head(response.head)
        if mismatch := self.form.check(head) or metadata_mismatch(head, page):
            return _Fault(mismatch, head.field(b"etag"))
        self._take_note(page, head)
        if checksum_matches(head, response.checksum):
            return None
        return _Fault("checksum", head.field(b"etag"), response.checksum)

    def _take_note(self, page: Page, head: ResponseHead) -> None:
        if (noted := self.noted()) is not None:
            noted.saw(page.key, head)

    def fetch(
        self,
        page: Page,
        deadline: float,
        guard: Guard,
        seen: Mapping[PageKey, _Fault] = NOTHING_SEEN,
    ) -> LoadResult:
        """Load a page; a copy that is not what it should be is set aside.

        Not so at the first sight of it: a network that alters a response would do away with an
        intact object. The copy is at fault if reading it again shows the same as the first time, or
        as `seen`.
        """
        name = self.names.page(page.key)
        try:
            with self.form.room(page) as stored:
                receive = partial(self._receive, page, stored, deadline)
                fault = seen.get(page.key)
                if fault is None:
                    fault = self.client.exchange("GET", name, deadline, receive, guard=guard)
                if fault is not None:
                    again = self.client.exchange("GET", name, deadline, receive, guard=guard)
                    if again != fault:
                        self.telemetry.fault("response altered", TransferError(fault.reason))
                        if again is not None:
                            return LoadResult.FAILED
                        fault = None
        except UnreadableError as error:
            self.telemetry.fault("page unreadable", error)
            self._forget(page.key)
            return LoadResult.MISSING
        except (StatusError, TransferError) as error:
            if isinstance(error, StatusError) and error.status == HTTPStatus.NOT_FOUND:
                self._forget(page.key)
                return LoadResult.MISSING
            self.telemetry.fault(LOAD_FAILED, error)
            return LoadResult.FAILED
        if fault is not None:
            self._set_aside(page.key, fault, deadline)
            return LoadResult.CORRUPT
        return LoadResult.LOADED

    def _receive(
        self, page: Page, stored: Page, deadline: float, connection: Connection, head: ResponseHead
    ) -> _Fault | None:
        """Fill the page by way of `stored`, or tell what is wrong with the response."""
        if head.status != HTTPStatus.OK:
            refuse(connection, head, deadline)
        if mismatch := self.form.check(head) or metadata_mismatch(head, stored):
            return _Fault(mismatch, head.field(b"etag"))
        connection.receive_body(stored.buffers, deadline)
        self._take_note(page, head)
        reason: str | None = "checksum"
        if checksum_matches(head, page_checksum(stored.key, stored.buffers)):
            reason = self.form.restore(head, stored, page)
        if reason is None:
            return None
        return _Fault(reason, head.field(b"etag"), page_checksum(page.key, stored.buffers))

    def store(self, page: Page, deadline: float, guard: Guard) -> SpillResult:
        """Spill a page: others see it complete or not at all, since a PUT is atomic."""
        name = self.names.page(page.key)
        try:
            with self.form.room(page) as stored:

                def fields() -> Mapping[str, str]:
                    self.form.store(page, stored)
                    return {**page_fields(stored), **self.form.fields, **self.storage_fields}

                body = stored.buffers
                self._command("PUT", name, deadline, fields=fields, body=body, guard=guard)
        except (StatusError, TransferError) as error:
            self.telemetry.fault(SPILL_FAILED, error)
            if isinstance(error, StatusError):
                if error.code == "NoSuchBucket":
                    self.on_bucket_lost()
                if error.status == HTTPStatus.INSUFFICIENT_STORAGE or error.code == OVER_QUOTA:
                    return SpillResult.REFUSED
            return SpillResult.FAILED
        self.knowledge.add([page.key])
        if (noted := self.noted()) is not None:
            noted.stored(page.key)
        return SpillResult.STORED

    def _set_aside(self, key: PageKey, fault: _Fault, deadline: float) -> None:
        """Move a corrupt copy to the quarantine, so that a correct one can be stored.

        A reader leaves it where it is. So does everybody if another node has done it meanwhile,
        and perhaps stored the page anew.
        """
        name, aside = self.names.page(key), self.names.quarantine(key)
        source = {"x-amz-copy-source": quote(f"/{self.bucket}/{name}"), "content-length": "0"}
        source |= self.storage_fields
        if fault.etag is not None:
            source["x-amz-copy-source-if-match"] = fault.etag.decode("latin-1")
        self.telemetry.count("corrupt")
        logger.warning(
            "minio page corrupt", extra={"fields": {"object": name, "fault": fault.reason}}
        )
        if self.read_only:
            self._forget(key)
            return
        try:
            self._command("PUT", aside, deadline, fields=lambda: source)
        except (StatusError, TransferError) as error:
            self.telemetry.fault("quarantine failed", error)
            if isinstance(error, StatusError) and error.status in ANOTHER_COPY:
                self._forget(key)
                return
        try:
            self._command("DELETE", name, deadline)
        except (StatusError, TransferError) as error:
            self.telemetry.fault("quarantine failed", error)
        self._forget(key)

    def _command(
        self,
        method: str,
        name: str,
        deadline: float,
        *,
        fields: Callable[[], Mapping[str, str]] = lambda: NO_FIELDS,
        body: tuple[memoryview, ...] = (),
        guard: Guard = UNGUARDED,
    ) -> None:
        """Send a request whose answer is all in its status."""

        def receive(connection: Connection, head: ResponseHead) -> None:
            if head.status not in (HTTPStatus.OK, HTTPStatus.NO_CONTENT):
                refuse(connection, head, deadline)
            connection.discard_body(deadline)

        self.client.exchange(method, name, deadline, receive, fields=fields, body=body, guard=guard)

    def _forget(self, key: PageKey) -> None:
        self.knowledge.discard(key)
        self.knowledge.add_missing(key)
