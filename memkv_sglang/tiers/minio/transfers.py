"""One page up or down: what each answer of the server means for it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote

from memkv_sglang.page import ChangedPageError, Page, PageKey, page_checksum, scatter
from memkv_sglang.tiers.base import Fetched, LoadResult, SpillResult
from memkv_sglang.tiers.minio.forms import PageForm
from memkv_sglang.tiers.minio.http import (
    Connection,
    ProtocolError,
    Response,
    ResponseHead,
    StatusError,
    TransferError,
    UnreadableError,
    framed_head,
    parse_head,
    unusable_answer,
)
from memkv_sglang.tiers.minio.names import (
    ObjectNames,
    checksum_matches,
    fast_match,
    is_foreign,
    is_stored,
    metadata_mismatch,
    page_fields,
)
from memkv_sglang.tiers.minio.objects import (
    LOAD_FAILED,
    NO_FIELDS,
    SPILL_FAILED,
    UNGUARDED,
    BulkReader,
    Guard,
    ObjectClient,
    Telemetry,
    refuse,
)
from memkv_sglang.tiers.minio.presence_cache import PresenceCache
from memkv_sglang.tiers.minio.retention import AccessTimeCache

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

Receive = Callable[[Connection, ResponseHead], _Fault | bytes]
"""Reads a response: returns the page's verified checksum, or what is wrong."""


class FetchedPages(NamedTuple):
    """What became of pages that were loaded at once; the rest are for `fetch`."""

    checksums: list[bytes | None]
    """What the content of each was verified against, None for those that were not loaded."""
    faults: Mapping[PageKey, _Fault]
    """What was wrong with those that came."""
    failure: TransferError | None
    """Why the rest need not be tried, None if they should be."""


class PageTransfers(NamedTuple):
    """Moves pages of one bucket and keeps what it learns. Faults are results and a log line."""

    client: ObjectClient
    bulk: BulkReader
    bucket: str
    names: ObjectNames
    knowledge: PresenceCache
    telemetry: Telemetry
    form: PageForm
    storage_fields: Mapping[str, str]
    """Header fields that tell the server how to keep what it is given."""
    on_bucket_lost: Callable[[], None]
    read_only: bool = False
    noted: Callable[[], AccessTimeCache | None] = lambda: None
    """Who is told when the pages' objects were written last, if anybody."""

    def fetch_all(self, pages: Sequence[Page], deadline: float) -> FetchedPages:
        """Load pages at once as far as each comes as it should, see `BulkReader`."""
        checksums: list[bytes | None] = [None] * len(pages)
        faults = dict[PageKey, _Fault]()
        if not self.form.in_place:
            return FetchedPages(checksums, faults, None)
        objects = [(self.names.page(page.key), page) for page in pages]
        responses, failure = self.bulk.read(objects, deadline)
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
                checksums[response.number] = response.checksum
            else:
                faults[page.key] = fault
        return FetchedPages(checksums, faults, failure)

    def _judge(self, page: Page, response: Response) -> _Fault | None:
        head = framed_head(response.head, page.length)
        if fast_match(head, page, response.checksum):
            self._take_note(page, head)
            return None
        head = parse_head(response.head)
        if is_foreign(head):
            raise unusable_answer(head)
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
    ) -> Fetched:
        """Load a page; set a corrupt copy aside.

        Not at first sight: a network that alters a response, or a client that writes into its
        buffers, would do away with an intact object. So it is read again, into memory of the
        agent's own, and set aside if it shows the same fault as the first time, or as `seen`.
        """
        name = self.names.page(page.key)

        def get(receive: Receive) -> _Fault | bytes:
            return self.client.exchange("GET", name, deadline, receive, guard=guard)

        try:
            first = seen.get(page.key) or get(partial(self._receive, page, deadline))
            if isinstance(first, bytes):
                return Fetched(LoadResult.LOADED, first)
            again = get(partial(self._receive_copy, page, deadline))
        except UnreadableError as error:
            self.telemetry.fault("page unreadable", error)
            self._forget(page.key)
            return Fetched(LoadResult.MISSING)
        except (StatusError, TransferError) as error:
            if isinstance(error, StatusError) and error.status == HTTPStatus.NOT_FOUND:
                self._forget(page.key)
                return Fetched(LoadResult.MISSING)
            self.telemetry.fault(LOAD_FAILED, error)
            return Fetched(LoadResult.FAILED)
        if again == first:
            self._set_aside(page.key, first, deadline)
            return Fetched(LoadResult.CORRUPT)
        self.telemetry.fault("response altered", TransferError(first.reason))
        if isinstance(again, bytes):
            return Fetched(LoadResult.LOADED, again)
        return Fetched(LoadResult.FAILED)

    def _receive(
        self, page: Page, deadline: float, connection: Connection, head: ResponseHead
    ) -> _Fault | bytes:
        """Fill the page and return its checksum, or tell what is wrong with the response."""
        if head.status != HTTPStatus.OK:
            refuse(connection, head, deadline)
        if is_foreign(head):
            if head.field(b"etag"):
                raise UnreadableError(str(unusable_answer(head)))
            raise unusable_answer(head)
        with self.form.room(page) as stored:
            if mismatch := self.form.check(head) or metadata_mismatch(head, stored):
                return _Fault(mismatch, head.field(b"etag"))
            connection.receive_body(stored.buffers, deadline)
            self._take_note(page, head)
            received = page_checksum(stored.key, stored.buffers)
            if not checksum_matches(head, received):
                return _Fault("checksum", head.field(b"etag"), received)
            checksum = self.form.restore(head, stored, page, received)
            return checksum or _Fault("authentication tag", head.field(b"etag"), received)

    def _receive_copy(
        self, page: Page, deadline: float, connection: Connection, head: ResponseHead
    ) -> _Fault | bytes:
        """Receive into memory that no client can write to, and fill the page from there."""
        copy = Page(page.key, (memoryview(bytearray(page.length)),))
        received = self._receive(copy, deadline, connection, head)
        if isinstance(received, bytes):
            scatter(copy.buffers[0], page.buffers)
        return received

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
        except (StatusError, TransferError, ChangedPageError) as error:
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
                refuse(connection, head, deadline, method)
            body = connection.discard_body(deadline)
            if method == "PUT" and not is_stored(head, body):
                raise unusable_answer(head)

        self.client.exchange(method, name, deadline, receive, fields=fields, body=body, guard=guard)

    def _forget(self, key: PageKey) -> None:
        self.knowledge.discard(key)
        self.knowledge.add_missing(key)
