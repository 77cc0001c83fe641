"""Send signed requests for objects on pooled connections. Each ends by its deadline."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import quote

from memkv_sglang.tiers.minio.auth import NO_FIELDS, REFUSED, Signer
from memkv_sglang.tiers.minio.http import (
    ClosedError,
    Connection,
    ConnectionPool,
    ProtocolError,
    ResponseHead,
    StaleError,
    StatusError,
    is_html,
    modified_time,
    refused,
    unusable_answer,
)
from memkv_sglang.tiers.minio.names import page_metadata, stores_page
from memkv_sglang.tiers.minio.objects.bulk_client import BulkClient
from memkv_sglang.tiers.minio.objects.telemetry import Telemetry

if TYPE_CHECKING:
    from minio.credentials.credentials import Credentials

Answer = TypeVar("Answer")

Guard = AbstractContextManager[None]
"""Encloses each use of a page's buffers. Raises `OutOfTimeError` after the end of the call."""

UNGUARDED: Guard = nullcontext()
"""A guard for buffers that outlive the call."""

PIPELINE = 16
"""Maximum HEAD requests in flight per connection. Their responses must fit in socket buffers."""


class ObjectClient:
    """Sends requests for the objects of one bucket. Thread-safe."""

    def __init__(
        self, pool: ConnectionPool, signer: Signer, telemetry: Telemetry, *, ways: int
    ) -> None:
        """Use the pool's connections, up to `ways` of them at once for one call."""
        self._pool = pool
        self._signer = signer
        self._ways = ways
        self.telemetry = telemetry
        self.bulk = BulkClient(pool, signer, telemetry, page_metadata(), connections=ways)
        """Reads and writes whole pages on the fast path."""

    def exchange(
        self,
        method: str,
        name: str,
        deadline: float,
        receive: Callable[[Connection, ResponseHead], Answer],
        *,
        fields: Callable[[], Mapping[str, str]] = lambda: NO_FIELDS,
        body: Sequence[memoryview] = (),
        guard: Guard = UNGUARDED,
        bodiless: bool = False,
    ) -> Answer:
        """Send a request for an object, and return what `receive` makes of the response.

        `bodiless` means that the method is HEAD. `fields`, `body` and `receive` are used only
        within the guard. A stale connection is replaced once. Blocks until the deadline at most.
        Raises `TransferError`, and what `receive` raises.
        """
        path = quote(name)

        def attempt(credentials: "Credentials") -> Answer:
            for fresh in (False, True):
                try:
                    with self._pool.lend(deadline, fresh=fresh) as connection, guard:
                        request = self._request(connection, credentials, method, path, fields())
                        connection.send(request, body, deadline)
                        head = connection.receive_head(deadline, bodiless=bodiless)
                        return receive(connection, head)
                except StaleError:
                    if fresh:
                        raise
            raise AssertionError("a fresh connection is never stale")

        return self._signed(attempt, deadline)

    def _signed(self, attempt: Callable[["Credentials"], Answer], deadline: float) -> Answer:
        """Make an attempt, and another one if the credentials were refused and have changed."""
        # this may block, so it must not be within the guard
        credentials = self._signer.credentials(deadline)
        try:
            return attempt(credentials)
        except StatusError as error:
            if error.status not in REFUSED or not self._signer.renew(credentials, deadline):
                raise
            return attempt(self._signer.credentials(deadline))

    def exist(self, names: Sequence[str], deadline: float) -> list[bool]:
        """Return which names belong to stored pages, judging by their metadata; see `heads`."""
        return [self._stores_page(head) for head in self.heads(names, deadline)]

    def stored_times(self, names: Sequence[str], deadline: float) -> list[float]:
        """Return when each page was stored, by the server's clock; 0 if it was not. See `heads`."""
        return [
            modified_time(head) if self._stores_page(head) else 0.0
            for head in self.heads(names, deadline)
        ]

    def heads(
        self, names: Sequence[str], deadline: float, *, ways: int | None = None
    ) -> list[ResponseHead]:
        """Return each object's head, of status 200 or 404.

        Takes one round trip for up to `PIPELINE` names per connection, in the calling thread.
        Requests that a closing connection leaves unanswered are sent again. Raises
        `TransferError`, `StatusError`.
        """
        return self._signed(partial(self._heads, names, ways or self._ways, deadline), deadline)

    def _heads(
        self, names: Sequence[str], ways: int, deadline: float, credentials: "Credentials"
    ) -> list[ResponseHead]:
        found: dict[int, ResponseHead] = {}
        waiting = deque(range(len(names)))
        depth, fresh = PIPELINE, False
        while waiting:
            batch = [waiting.popleft() for _ in range(min(ways * depth, len(waiting)))]
            try:
                answers = self._pipeline(
                    [names[i] for i in batch], ways, credentials, deadline, fresh=fresh
                )
            except ClosedError as error:
                if fresh and depth == 1:
                    raise
                if not isinstance(error, StaleError):
                    depth = 1  # the server may close after pipelined requests
                fresh = True
                waiting.extendleft(reversed(batch))
                continue
            fresh = False
            for index, head in zip(batch, answers, strict=True):
                if head is None:
                    depth = 1  # this server may close after each response
                    waiting.append(index)
                else:
                    found[index] = head
        return [found[i] for i in range(len(names))]

    def _pipeline(
        self,
        names: Sequence[str],
        ways: int,
        credentials: "Credentials",
        deadline: float,
        *,
        fresh: bool,
    ) -> list[ResponseHead | None]:
        """Send all HEAD requests, then receive all responses.

        Returns None for requests that the server left unanswered when it closed a connection. On
        each connection, it answers at least one.
        """
        ways = min(ways, len(names))
        found: list[ResponseHead | None] = []
        self.telemetry.count("lookup_round_trips")
        with ExitStack() as lent:
            lanes: list[Connection | None] = [
                lent.enter_context(self._pool.lend(deadline, fresh=fresh)) for _ in range(ways)
            ]
            for lane, connection in enumerate(lanes):
                assert connection is not None
                paths = [quote(name) for name in names[lane::ways]]
                requests = [
                    self._request(connection, credentials, "HEAD", path, NO_FIELDS)
                    for path in paths
                ]
                connection.send(b"".join(requests), (), deadline, requests=len(paths))
            for i in range(len(names)):
                lane = i % ways
                connection = lanes[lane]
                head = None
                if connection is not None:
                    head = self._pipelined_head(connection, deadline, first=i < ways)
                if head is None or not head.keep_alive:
                    lanes[lane] = None
                found.append(head)
        return found

    @staticmethod
    def _pipelined_head(
        connection: Connection, deadline: float, *, first: bool
    ) -> ResponseHead | None:
        try:
            head = connection.receive_head(deadline, bodiless=True)
        except ClosedError:
            if first:
                raise
            connection.close()
            return None
        if head.status not in (HTTPStatus.OK, HTTPStatus.NOT_FOUND):
            raise refused(head, b"", "HEAD")
        return head

    def _stores_page(self, head: ResponseHead) -> bool:
        """Return whether a response to HEAD is that of a stored page. Counts other objects.

        Raises `ProtocolError` for a 404 that is not an object store's.
        """
        stored = stores_page(head)
        if head.status == HTTPStatus.OK and not stored:
            self.telemetry.fault("answer is no page", unusable_answer(head))
        if head.status == HTTPStatus.NOT_FOUND and is_html(head):
            raise unusable_answer(head)
        return stored

    def _request(
        self,
        connection: Connection,
        credentials: "Credentials",
        method: str,
        path: str,
        fields: Mapping[str, str],
    ) -> bytes:
        demand_printable(fields)
        endpoint = connection.endpoint
        return self._signer.head(credentials, method, endpoint, endpoint.base_path + path, fields)


def demand_printable(fields: Mapping[str, str]) -> None:
    """Raise `ProtocolError` for a field that would break the head of a request.

    ETags and metadata are copied from responses into requests.
    """
    if not "".join((*fields, *fields.values())).isprintable():
        raise ProtocolError("the response has control characters in a field")


def refuse(
    connection: Connection, head: ResponseHead, deadline: float, method: str = "GET"
) -> NoReturn:
    """Raise the `StatusError` for a response. Reads its body to keep the connection usable."""
    body = connection.discard_body(deadline)
    if head.status == HTTPStatus.NOT_FOUND and is_html(head):
        raise unusable_answer(head)  # A proxy's 404 says nothing about the object.
    raise refused(head, body, method)
