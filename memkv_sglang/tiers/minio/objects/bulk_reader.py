"""The fast path of loads: many objects read at once by the compiled receive loop.

Where the loop is not compiled, callers read all pages on the slow path, one request at a time.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple
from urllib.parse import quote

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.auth import Signer
from memkv_sglang.tiers.minio.http import (
    Connection,
    ConnectionPool,
    Endpoint,
    Request,
    Response,
    Server,
    Source,
    TransferError,
)
from memkv_sglang.tiers.minio.objects.telemetry import Telemetry

# Why there is no compiled loop; empty if there is one.
try:
    from memkv_sglang.tiers.minio.http import receive_loop as loop
except ImportError as error:  # there was no compiler, or no xxhash that exports its functions
    WHY_NOT = str(error)
else:
    WHY_NOT = ""

WRITTEN_AT_ONCE = 16
"""Maximum number of requests that are signed in a row."""

logger = logging.getLogger(__name__)


class BulkAnswer(NamedTuple):
    """The objects that the fast path received."""

    responses: list[Response]
    failure: TransferError | None
    """Why the other objects should not be tried on the slow path; None if they should."""


class Requests:
    """Signed GET requests for the objects of one call, in order. Thread-safe."""

    def __init__(
        self, signer: Signer, objects: Sequence[tuple[str, Page]], deadline: float
    ) -> None:
        """Sign for objects, given by name and page. Blocks until there are credentials.

        Raises `TransferError`.
        """
        self._signer = signer
        self._credentials = signer.credentials(deadline)
        self._objects = enumerate(objects)
        self._left = len(objects)
        self._written: dict[Endpoint, deque[Request]] = {}
        self._lock = threading.Lock()

    def take(self, endpoint: Endpoint) -> Request | None:
        """Return the next request for a server, None if there are no more."""
        with self._lock:
            written = self._written.setdefault(endpoint, deque())
            if not written:
                written += self._write(endpoint)
            return written.popleft() if written else None

    def stop(self) -> None:
        """Drop the remaining requests."""
        with self._lock:
            self._objects = enumerate(())
            self._written.clear()

    def _write(self, endpoint: Endpoint) -> list[Request]:
        """Write the next requests, fewer towards the end to balance the load between servers."""
        count = min(max(self._left // 4, 1), WRITTEN_AT_ONCE)
        found = list(islice(self._objects, count))
        self._left -= len(found)
        return [
            Request(number, page, self._head(endpoint, quote(name)))
            for number, (name, page) in found
        ]

    def _head(self, endpoint: Endpoint, path: str) -> bytes:
        target = endpoint.base_path + path
        return self._signer.head(self._credentials, "GET", endpoint, target, {})


class BulkReader:
    """Reads objects for one call at a time. Thread-safe."""

    def __init__(
        self, pool: ConnectionPool, signer: Signer, telemetry: Telemetry, *, connections: int
    ) -> None:
        """Use up to `connections` of the pool's connections, and one thread for two cores.

        The calling thread is one of them. Where cores are scarce, switching threads costs more
        than it gains.
        """
        self._pool = pool
        self._signer = signer
        self._telemetry = telemetry
        self._connections = connections
        self._threads = max((os.cpu_count() or 1) // 2, 1)
        self._busy = threading.Lock()

    def read(self, objects: Sequence[tuple[str, Page]], deadline: float) -> BulkAnswer:
        """GET objects, given by name, into the buffers of their pages.

        Stops at the first response that is not an object of its page's length. Reads nothing while
        another call is reading, or while too few connections are open: the slow path opens them all
        at once. The buffers are not written to after this returns. Blocks until `deadline` at most.
        """
        responses: list[Response] = []
        if WHY_NOT or not objects or not self._busy.acquire(blocking=False):
            return BulkAnswer(responses, None)
        taken: list[tuple[Server, Connection]] = []
        try:
            taken = self._pool.take_idle(min(self._connections, len(objects)))
            if taken:
                requests = Requests(self._signer, objects, deadline)
                connections = [connection for _, connection in taken]
                self._receive(connections, requests, responses, deadline)
        except TransferError as error:
            return BulkAnswer(responses, error)
        except Exception:
            logger.exception("bulk read failed unexpectedly")
        finally:
            for server, connection in taken:
                self._pool.give_back(server, connection, None)
            self._busy.release()
        return BulkAnswer(responses, None)

    def _receive(
        self,
        connections: list[Connection],
        requests: Requests,
        responses: list[Response],
        deadline: float,
    ) -> None:
        fall_back = self._telemetry.count_fallback
        source = Source(requests.take, requests.stop, responses.append, fall_back)
        failures: list[BaseException] = []

        def work(share: list[Connection]) -> None:
            try:
                loop.receive(share, source, deadline, self._pool.stall_timeout)
            except BaseException as error:
                requests.stop()
                failures.append(error)
                if not isinstance(error, TransferError):  # else the loop has closed them
                    for connection in share:
                        connection.close()

        threads = min(self._threads, len(connections))
        shares = [connections[i::threads] for i in range(threads)]
        helpers: list[threading.Thread] = []
        try:
            for share in shares[1:]:
                helper = threading.Thread(target=work, args=(share,), name="memkv-bulk")
                helper.start()
                helpers.append(helper)
            work(shares[0])
        finally:
            requests.stop()
            for helper in helpers:
                helper.join()
        if failures:
            raise failures[0]
