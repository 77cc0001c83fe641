"""Move pages between client buffers and the bucket, and interpret the server's responses."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import NamedTuple, TypeVar
from urllib.parse import quote

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import ChangedPageError, Page, PageKey, page_checksum, scatter
from memkv_sglang.tiers.base import Fetched, LoadResult, SpillResult
from memkv_sglang.tiers.minio.auth import NO_FIELDS
from memkv_sglang.tiers.minio.forms import PageForm
from memkv_sglang.tiers.minio.http import (
    Connection,
    ProtocolError,
    Request,
    Response,
    ResponseHead,
    StatusError,
    TransferError,
    UnreadableError,
    parse_head,
    unusable_answer,
)
from memkv_sglang.tiers.minio.names import (
    CHECKSUM,
    ObjectNames,
    checksum_matches,
    is_foreign,
    is_stored,
    metadata_mismatch,
    page_fields,
    server_side_encryption,
    size_fields,
)
from memkv_sglang.tiers.minio.objects import (
    LOAD_FAILED,
    SPILL_FAILED,
    UNGUARDED,
    Guard,
    ObjectClient,
    refuse,
)
from memkv_sglang.tiers.minio.presence_cache import PresenceCache
from memkv_sglang.tiers.minio.transfer_pool import TransferPool

ANOTHER_COPY = (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.NOT_FOUND)
"""Statuses of a copy whose source was removed or overwritten after it was read."""

OVER_QUOTA = "XMinioAdminBucketQuotaExceeded"
"""MinIO's error code when the bucket's quota is used up."""

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _Fault(NamedTuple):
    """Why a response is not the page. Two reads of the same corrupt object give equal faults."""

    reason: str
    etag: bytes | None
    content: bytes = b""
    """Checksum of the body; empty if the body was not read."""


Receive = Callable[[Connection, ResponseHead], _Fault | bytes]
"""Reads a response; returns the page's verified checksum, or the fault."""


class PageTransfers:
    """Loads and spills the pages of one bucket, and updates the node's caches. Thread-safe.

    Failures are results and log lines, not exceptions.
    """

    def __init__(
        self,
        config: MinioConfig,
        client: ObjectClient,
        threads: TransferPool,
        form: PageForm,
        presence: PresenceCache,
        *,
        stored: Callable[[Sequence[PageKey], int], None],
        on_bucket_lost: Callable[[], None],
    ) -> None:
        """Use the client for requests and the threads to run several at once.

        `stored` is called for each PUT with the page and the size of its object, whatever the
        result: the server may store it even if it does not answer.
        """
        self._client = client
        self._telemetry = client.telemetry
        self._threads = threads
        self._form = form
        self._presence = presence
        self._stored = stored
        self._on_bucket_lost = on_bucket_lost
        self._bucket = config.bucket
        self._names = ObjectNames(config.prefix)
        self._storage_fields = server_side_encryption(config)
        self._connections = config.connections
        self._read_only = config.role == "reader"

    def load(self, pages: Sequence[Page], deadline: float) -> list[Fetched | None]:
        """Receive pages into their buffers; return None for pages that were not tried.

        Well-formed responses take the fast path. The other pages are then read one by one, in
        order, until one of them is not loaded.
        """
        checksums, faults, failure = self._load_fast(pages, deadline)
        rest = [i for i, checksum in enumerate(checksums) if checksum is None]
        failed = Fetched(LoadResult.FAILED)
        if failure is not None:
            self._telemetry.fault(LOAD_FAILED, failure)
            results = stopped(failed, len(rest))
        else:
            results = self._move_all(
                partial(self._load_page, faults),
                [pages[i] for i in rest],
                deadline,
                goes_on=lambda fetched: fetched.result is LoadResult.LOADED,
                failed=failed,
            )
        outcomes: list[Fetched | None] = [Fetched(LoadResult.LOADED, c) for c in checksums]
        for index, fetched in zip(rest, results, strict=True):
            outcomes[index] = fetched
        return outcomes

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult | None]:
        """Send pages from their buffers, in order; return None for pages that were not tried.

        Pages take the fast path until a response does not confirm a stored page; the other pages
        are then sent one by one. Several are in flight at once, so a few pages after a failed one
        may still be stored.
        """
        stored, failure = self._spill_fast(pages, deadline)
        if all(stored):
            return [SpillResult.STORED] * len(pages)
        rest = [i for i, is_stored in enumerate(stored) if not is_stored]
        if failure is not None:
            self._telemetry.fault(SPILL_FAILED, failure)
            results = stopped(SpillResult.FAILED, len(rest))
        else:
            results = self._move_all(
                self._spill_page,
                [pages[i] for i in rest],
                deadline,
                goes_on=lambda result: result is SpillResult.STORED,
                failed=SpillResult.FAILED,
            )
        outcomes: list[SpillResult | None] = [SpillResult.STORED] * len(pages)
        for index, result in zip(rest, results, strict=True):
            outcomes[index] = result
        return outcomes

    def _spill_fast(
        self, pages: Sequence[Page], deadline: float
    ) -> tuple[list[bool], TransferError | None]:
        """Return which pages were stored, and why to give up."""
        if not pages:
            return [], None
        length = pages[0].length
        size = length + self._form.overhead
        fields = {**size_fields(size), **self._form.fields, **self._storage_fields}
        with self._form.scratch(length, min(len(pages), self._connections)) as memory:
            written = self._client.bulk.write(
                self._requests(pages),
                length,
                fields,
                CHECKSUM,
                deadline,
                sealing=self._form.sealing,
                memory=memory,
            )
        self._stored([page.key for page in pages[: written.started]], size)
        stored = zip(pages, written.stored, strict=True)
        self._presence.add([page.key for page, is_stored in stored if is_stored])
        return written.stored, written.failure

    def _move_all(
        self,
        move: Callable[[Page, float, Guard], Result],
        pages: Sequence[Page],
        deadline: float,
        *,
        goes_on: Callable[[Result], bool],
        failed: Result,
    ) -> list[Result | None]:
        if not pages:
            return []
        return self._threads.run(
            lambda index, guard: move(pages[index], deadline, guard),
            len(pages),
            deadline,
            goes_on=goes_on,
            failed=failed,
        )

    def _load_fast(
        self, pages: Sequence[Page], deadline: float
    ) -> tuple[list[bytes | None], Mapping[PageKey, _Fault], TransferError | None]:
        """Return each page's verified checksum or None, the faults found, and why to give up."""
        requests, sealing = self._requests(pages), self._form.sealing
        answer = self._client.bulk.read(requests, deadline, sealing=sealing)
        checksums, faults = answer.checksums, dict[PageKey, _Fault]()
        for response in answer.unverified:
            page = pages[response.number]
            try:
                fault = self._verify(page, response)
            except (ProtocolError, UnreadableError):
                continue
            except Exception:
                logger.exception("cannot verify a response")
                continue
            if fault is None:
                checksums[response.number] = response.checksum
            else:
                faults[page.key] = fault
        return checksums, faults, answer.failure

    def _requests(self, pages: Sequence[Page]) -> list[Request]:
        paths = self._names.page_paths(page.key for page in pages)
        return list(map(Request, paths, pages))

    def _verify(self, page: Page, response: Response) -> _Fault | None:
        head = parse_head(response.head)
        if fault := self._head_fault(head, page):
            return fault
        return _content_fault(head, response.checksum)

    def _load_page(
        self, faults: Mapping[PageKey, _Fault], page: Page, deadline: float, guard: Guard
    ) -> Fetched:
        """Load one page. Quarantines a corrupt object.

        A single bad read proves nothing: the network may have altered the response, or the client
        may have written to its buffers. So the object is read again into private memory, and
        quarantined only if the fault is the same as in the first read or in `faults`.
        """
        name = self._names.page(page.key)

        def get(receive: Receive) -> _Fault | bytes:
            return self._client.exchange("GET", name, deadline, receive, guard=guard)

        try:
            first = faults.get(page.key) or get(partial(self._receive, page, deadline))
            if isinstance(first, bytes):
                return Fetched(LoadResult.LOADED, first)
            again = get(partial(self._receive_privately, page, deadline))
        except UnreadableError as error:
            self._telemetry.fault("page unreadable", error)
            self._mark_missing(page.key)
            return Fetched(LoadResult.MISSING)
        except (StatusError, TransferError) as error:
            if isinstance(error, StatusError) and error.status == HTTPStatus.NOT_FOUND:
                self._mark_missing(page.key)
                return Fetched(LoadResult.MISSING)
            self._telemetry.fault(LOAD_FAILED, error)
            return Fetched(LoadResult.FAILED)
        if again == first:
            self._quarantine(page.key, first, deadline)
            return Fetched(LoadResult.CORRUPT)
        self._telemetry.fault("response altered", TransferError(first.reason))
        if isinstance(again, bytes):
            return Fetched(LoadResult.LOADED, again)
        return Fetched(LoadResult.FAILED)

    def _receive(
        self, page: Page, deadline: float, connection: Connection, head: ResponseHead
    ) -> _Fault | bytes:
        """Fill the page; return its verified checksum, or what is wrong with the response."""
        if head.status != HTTPStatus.OK:
            refuse(connection, head, deadline)
        with self._form.stored_page(page) as stored:
            if fault := self._head_fault(head, stored):
                return fault
            connection.receive_body(stored.buffers, deadline)
            received = page_checksum(stored.key, stored.buffers)
            if fault := _content_fault(head, received):
                return fault
            checksum = self._form.restore(head, stored, page, received)
            return checksum or _Fault("authentication tag", head.field(b"etag"), received)

    def _receive_privately(
        self, page: Page, deadline: float, connection: Connection, head: ResponseHead
    ) -> _Fault | bytes:
        """Receive into memory that no client can write to, then copy it to the page."""
        copy = Page(page.key, (memoryview(bytearray(page.length)),))
        received = self._receive(copy, deadline, connection, head)
        if isinstance(received, bytes):
            scatter(copy.buffers[0], page.buffers)
        return received

    def _head_fault(self, head: ResponseHead, stored: Page) -> _Fault | None:
        """Return why a response with status 200 cannot be the stored page; None if it can.

        Raises `UnreadableError` for an object that this node cannot use, and `ProtocolError` for a
        response that is not an object store's.
        """
        if is_foreign(head):
            if head.field(b"etag"):
                raise UnreadableError(str(unusable_answer(head)))
            raise unusable_answer(head)
        mismatch = self._form.check(head) or metadata_mismatch(head, stored)
        return _Fault(mismatch, head.field(b"etag")) if mismatch else None

    def _spill_page(self, page: Page, deadline: float, guard: Guard) -> SpillResult:
        """Spill one page. A PUT is atomic: other nodes see the whole page or nothing."""
        name = self._names.page(page.key)
        try:
            with self._form.stored_page(page) as stored:

                def fields() -> Mapping[str, str]:
                    self._form.store(page, stored)
                    return {**page_fields(stored), **self._form.fields, **self._storage_fields}

                body = stored.buffers
                self._stored([page.key], stored.length)
                self._command("PUT", name, deadline, fields=fields, body=body, guard=guard)
        except (StatusError, TransferError, ChangedPageError) as error:
            self._telemetry.fault(SPILL_FAILED, error)
            if isinstance(error, StatusError):
                if error.code == "NoSuchBucket":
                    self._on_bucket_lost()
                if error.status == HTTPStatus.INSUFFICIENT_STORAGE or error.code == OVER_QUOTA:
                    return SpillResult.REFUSED
            return SpillResult.FAILED
        self._presence.add([page.key])
        return SpillResult.STORED

    def _quarantine(self, key: PageKey, fault: _Fault, deadline: float) -> None:
        """Move a corrupt object to the quarantine, so that a correct one can be stored.

        A read-only node leaves the object in place. So does any node if another one has just moved
        it and perhaps stored the page again.
        """
        name, target = self._names.page(key), self._names.quarantine(key)
        source = {"x-amz-copy-source": quote(f"/{self._bucket}/{name}"), "content-length": "0"}
        source |= self._storage_fields
        if fault.etag is not None:
            source["x-amz-copy-source-if-match"] = fault.etag.decode("latin-1")
        self._telemetry.count("corrupt")
        logger.warning(
            "minio page corrupt", extra={"fields": {"object": name, "fault": fault.reason}}
        )
        if self._read_only:
            self._mark_missing(key)
            return
        try:
            self._command("PUT", target, deadline, fields=lambda: source)
        except (StatusError, TransferError) as error:
            self._telemetry.fault("quarantine failed", error)
            if isinstance(error, StatusError) and error.status in ANOTHER_COPY:
                self._mark_missing(key)
                return
        try:
            self._command("DELETE", name, deadline)
        except (StatusError, TransferError) as error:
            self._telemetry.fault("quarantine failed", error)
        self._mark_missing(key)

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
        """Send a request that returns no content. Raises `StatusError`, `TransferError`."""

        def receive(connection: Connection, head: ResponseHead) -> None:
            if head.status not in (HTTPStatus.OK, HTTPStatus.NO_CONTENT):
                refuse(connection, head, deadline, method)
            body = connection.discard_body(deadline)
            if method == "PUT" and not is_stored(head, body):
                raise unusable_answer(head)

        self._client.exchange(
            method, name, deadline, receive, fields=fields, body=body, guard=guard
        )

    def _mark_missing(self, key: PageKey) -> None:
        self._presence.discard(key)
        self._presence.add_missing(key)


def stopped(failed: Result, count: int) -> list[Result | None]:
    """Return results for `count` pages, of which the first failed and the others were not tried."""
    return [failed, *[None] * (count - 1)] if count else []


def _content_fault(head: ResponseHead, checksum: bytes) -> _Fault | None:
    if checksum_matches(head, checksum):
        return None
    return _Fault("checksum", head.field(b"etag"), checksum)
