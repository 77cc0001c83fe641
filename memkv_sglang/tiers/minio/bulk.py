"""Many objects read at once, as long as each of them is as it should be."""

import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from typing import NamedTuple
from urllib.parse import quote

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.client import NO_FIELDS
from memkv_sglang.tiers.minio.connection import Connection
from memkv_sglang.tiers.minio.endpoints import Endpoint
from memkv_sglang.tiers.minio.errors import ConnectError, TransferError
from memkv_sglang.tiers.minio.lanes import Request, Response, Source, receive
from memkv_sglang.tiers.minio.pool import ConnectionPool
from memkv_sglang.tiers.minio.signing import Signer

logger = logging.getLogger(__name__)

WRITTEN_AT_ONCE = 16
"""Requests that are written in a row at most."""


class BulkAnswer(NamedTuple):
    """What came, and why the rest need not be tried one by one, if so."""

    responses: list[Response]
    failure: TransferError | None


class BulkReader:
    """Reads for one call at a time. Safe for any number of threads."""

    def __init__(
        self, pool: ConnectionPool, *, connections: int, threads: int | None = None
    ) -> None:
        """Use up to so many of the pool's connections.

        And so many threads, the caller's one of them; by default one for two cores: where cores are
        scarce, handing over between threads costs more than they bring.
        """
        self._pool = pool
        self._connections = connections
        self._threads = threads or max((os.cpu_count() or 1) // 2, 1)
        self._helpers = ThreadPoolExecutor(connections, thread_name_prefix="memkv-bulk")
        self._busy = threading.Lock()
        self._closed = False

    def read(
        self, signer: Signer, objects: Sequence[tuple[str, Page]], deadline: float
    ) -> BulkAnswer:
        """GET objects, by their names, into the buffers of their pages.

        Stops at whatever is not an object of its page's length, and does nothing while another call
        is read for. Nothing writes to the buffers any more when this returns. Blocks until
        `deadline` at most.
        """
        responses: list[Response] = []
        if not objects or not self._busy.acquire(blocking=False):
            return BulkAnswer(responses, None)
        try:
            if not self._closed:
                self._read(_Requests(signer, objects, deadline), responses, deadline)
        except TransferError as error:
            return BulkAnswer(responses, error)
        except Exception:
            logger.exception("bulk read failed unexpectedly")
        finally:
            self._busy.release()
        return BulkAnswer(responses, None)

    def close(self) -> None:
        """End the threads after the call in flight, read nothing any more; idempotent."""
        with self._busy:
            self._closed = True
            self._helpers.shutdown()

    def _read(self, requests: "_Requests", responses: list[Response], deadline: float) -> None:
        source = Source(requests.take, requests.stop, responses.append)
        with ExitStack() as lent:
            connections = self._lend(lent, min(self._connections, requests.count), deadline)
            threads = min(self._threads, len(connections))
            shares = [connections[i::threads] for i in range(threads)]

            def work(share: list[Connection]) -> None:
                receive(share, source, deadline, self._pool.stall_timeout)

            helped: list[Future[None]] = []
            try:
                helped.extend(self._helpers.submit(work, share) for share in shares[1:])
                work(shares[0])
            finally:
                failures = [future.exception() for future in helped]  # waits for them
            for failure in filter(None, failures):
                raise failure

    def _lend(self, lent: ExitStack, count: int, deadline: float) -> list[Connection]:
        """Lend as many connections as can be had; raises `TransferError` if that is none."""
        connections = [lent.enter_context(self._pool.lend(deadline))]
        with suppress(ConnectError):
            connections.extend(
                lent.enter_context(self._pool.lend(deadline)) for _ in range(count - 1)
            )
        return connections


class _Requests:
    """The requests of one call, written a few at a time. Thread-safe."""

    def __init__(
        self, signer: Signer, objects: Sequence[tuple[str, Page]], deadline: float
    ) -> None:
        self._signer = signer
        self._credentials = signer.credentials(deadline)
        self._objects = enumerate(objects)
        self.count = self._left = len(objects)
        self._written: dict[Endpoint, deque[Request]] = {}
        self._lock = threading.Lock()

    def take(self, endpoint: Endpoint) -> Request | None:
        """Return the next request for a server."""
        with self._lock:
            written = self._written.setdefault(endpoint, deque())
            if not written:
                written += self._write(endpoint)
            return written.popleft() if written else None

    def stop(self) -> None:
        """Have no more requests."""
        with self._lock:
            self._objects = enumerate(())
            self._written.clear()

    def _write(self, endpoint: Endpoint) -> list[Request]:
        """Write some, fewer towards the end, so that the servers have as much to do each."""
        count = min(max(self._left // 4, 1), WRITTEN_AT_ONCE)
        found = list(islice(self._objects, count))
        self._left -= len(found)
        return [
            Request(number, page, self._head(endpoint, quote(name)))
            for number, (name, page) in found
        ]

    def _head(self, endpoint: Endpoint, path: str) -> bytes:
        target = endpoint.base_path + path
        return self._signer.head(self._credentials, "GET", endpoint, target, NO_FIELDS)
