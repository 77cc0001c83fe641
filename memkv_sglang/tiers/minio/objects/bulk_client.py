"""The fast path, in which the compiled loop reads or writes many objects at once.

If the loop is not compiled, callers move all pages on the slow path, one request at a time.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from memkv_sglang.tiers.minio.auth import NO_FIELDS, Signer
from memkv_sglang.tiers.minio.http import (
    BulkTemplate,
    Connection,
    ConnectionPool,
    Endpoint,
    Metadata,
    Request,
    Response,
    Sealing,
    Server,
    TransferError,
)
from memkv_sglang.tiers.minio.objects.telemetry import Telemetry

# Why the loop is not usable; empty if it is.
try:
    from memkv_sglang.tiers.minio.http import bulk_batch, bulk_loop
except ImportError as error:  # there was no C compiler, or a library does not export its functions
    WHY_NOT = str(error)
else:
    WHY_NOT = ""

logger = logging.getLogger(__name__)


Batch = TypeVar("Batch", bound="bulk_batch.Batch")

Templates = Mapping[Endpoint, BulkTemplate]


class BulkRead(NamedTuple):
    """What the fast path received."""

    checksums: list[bytes | None]
    """The checksum of each page that was received and verified; None for the others."""
    unverified: list[Response]
    """Objects whose metadata did not match on the fast path."""
    failure: TransferError | None
    """Error after which the other objects should not be tried on the slow path; None if they
    should."""


class BulkWritten(NamedTuple):
    """What the fast path sent."""

    stored: list[bool]
    """Whether the server confirmed that it stored each page."""
    started: int
    """Number of pages, from the first, that the server may have stored."""
    failure: TransferError | None
    """As for `BulkRead`."""


class Helpers:
    """Counts the threads that help callers: at most one per two cores. Thread-safe.

    Each call has its own thread, so helpers are for the cores that callers leave idle. With few
    cores, switching threads costs more than it gains.
    """

    def __init__(self) -> None:
        """Start without helpers."""
        self._free = max(len(os.sched_getaffinity(0)) // 2, 1) - 1
        self._lock = threading.Lock()

    def take(self, wanted: int) -> int:
        """Return how many helpers a call gets: at most half of the free ones."""
        with self._lock:
            got = max(min(wanted, (self._free + 1) // 2), 0)
            self._free -= got
            return got

    def give_back(self, count: int) -> None:
        """Give back `count` helpers."""
        with self._lock:
            self._free += count


class BulkClient:
    """Reads and writes objects for any number of calls at once. Thread-safe."""

    def __init__(
        self,
        pool: ConnectionPool,
        signer: Signer,
        telemetry: Telemetry,
        metadata: Metadata,
        *,
        connections: int,
    ) -> None:
        """Use up to `connections` of the pool's connections for each call.

        An object is rejected unless its head has the fields `metadata`.
        """
        self._pool = pool
        self._signer = signer
        self._telemetry = telemetry
        self._metadata = metadata
        self._connections = connections
        self._helpers = Helpers()

    def read(
        self,
        requests: Sequence[Request],
        deadline: float,
        *,
        sealing: Sealing | None = None,
    ) -> BulkRead:
        """GET objects into the buffers of their pages; decrypt them there if they are encrypted.

        Stops at the first response that is not an object of its page's length. The buffers are not
        written to after this returns. Blocks until `deadline` at most.
        """

        def prepare(templates: Templates) -> "bulk_batch.Download":
            report = self._telemetry.count_fallback
            return bulk_batch.Download(requests, templates, self._metadata, report, sealing=sealing)

        batch, failure = self._transfer("GET", len(requests), prepare, deadline)
        if batch is None:
            return BulkRead([None] * len(requests), [], failure)
        return BulkRead(batch.checksums(), batch.unverified(), failure)

    def write(
        self,
        requests: Sequence[Request],
        length: int,
        fields: Mapping[str, str],
        checksum_field: str,
        deadline: float,
        *,
        sealing: Sealing | None = None,
        memory: Sequence[bytearray] = (),
    ) -> BulkWritten:
        """PUT pages of `length` bytes, with the same header fields except for the checksum.

        Pages from the first of another length on are not sent. With `sealing`, pages are encrypted
        into `memory`, one piece per connection, and at most as many connections are used. Stops at
        the first response that does not confirm a stored object. The buffers are not read after
        this returns. Blocks until `deadline` at most.
        """

        def prepare(templates: Templates) -> "bulk_batch.Upload":
            report = self._telemetry.count_fallback
            return bulk_batch.Upload(
                requests, templates, report, length=length, sealing=sealing, memory=memory
            )

        count = len(requests) if sealing is None else min(len(requests), len(memory))
        batch, failure = self._transfer(
            "PUT", count, prepare, deadline, fields=fields, open_field=checksum_field
        )
        if batch is None:
            return BulkWritten([False] * len(requests), 0, failure)
        stored = batch.stored()
        stored += [False] * (len(requests) - len(stored))
        return BulkWritten(stored, batch.started, failure)

    def _transfer(
        self,
        method: str,
        count: int,
        prepare: Callable[[Templates], Batch],
        deadline: float,
        *,
        fields: Mapping[str, str] = NO_FIELDS,
        open_field: str = "",
    ) -> tuple[Batch | None, TransferError | None]:
        """Move a batch over up to `count` connections; return it, and why it ended early.

        `prepare` makes the batch from the templates of the servers.
        """
        if WHY_NOT or not count:
            return None, None
        failure = None
        taken: list[tuple[Server, Connection]] = []
        batch = None
        try:
            credentials = self._signer.credentials(deadline)
            taken = self._pool.take_several(min(self._connections, count), deadline)
            connections = [connection for _, connection in taken]
            batch = prepare(
                {
                    endpoint: self._signer.template(
                        credentials, method, endpoint, fields, open_field
                    )
                    for endpoint in {connection.endpoint for connection in connections}
                }
            )
            self._move(connections, batch, deadline)
        except TransferError as error:
            failure = error
        except Exception:
            logger.exception("bulk transfer failed unexpectedly")
        finally:
            if batch is not None:
                batch.close()
            self._pool.give_back_several(taken)
        return batch, failure

    def _move(
        self, connections: list[Connection], batch: "bulk_batch.Batch", deadline: float
    ) -> None:
        """Move the batch in this thread and in the helpers' threads."""
        failures: list[BaseException] = []

        def work(share: list[Connection]) -> None:
            try:
                bulk_loop.transfer(share, batch, deadline, self._pool.stall_timeout)
            except BaseException as error:
                batch.stop()
                failures.append(error)
                # otherwise the loop has closed the connections
                if not isinstance(error, TransferError):
                    for connection in share:
                        connection.close()

        helpers = self._helpers.take(len(connections) - 1)
        shares = [connections[i :: helpers + 1] for i in range(helpers + 1)]
        threads: list[threading.Thread] = []
        try:
            for share in shares[1:]:
                thread = threading.Thread(target=work, args=(share,), name="memkv-bulk")
                thread.start()
                threads.append(thread)
            work(shares[0])
        finally:
            batch.stop()
            for thread in threads:
                thread.join()
            self._helpers.give_back(helpers)
        if failures:
            raise failures[0]
