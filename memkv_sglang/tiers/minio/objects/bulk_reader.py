"""The fast path of loads, in which the compiled receive loop reads many objects at once.

If the loop is not compiled, callers read all pages on the slow path, one request at a time.
"""

import logging
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.tiers.minio.auth import Signer
from memkv_sglang.tiers.minio.http import (
    Connection,
    ConnectionPool,
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
    from memkv_sglang.tiers.minio.http import receive_loop as loop
except ImportError as error:  # there was no C compiler, or a library does not export its functions
    WHY_NOT = str(error)
else:
    WHY_NOT = ""

logger = logging.getLogger(__name__)


class BulkAnswer(NamedTuple):
    """What the fast path received."""

    checksums: list[bytes | None]
    """The checksum of each page that was received and verified; None for the others."""
    unverified: list[Response]
    """Objects whose metadata did not match on the fast path."""
    failure: TransferError | None
    """Error after which the other objects should not be tried on the slow path; None if they
    should."""


class Helpers:
    """Counts the threads that help callers receive: at most one per two cores. Thread-safe.

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


class BulkReader:
    """Reads objects for any number of calls at once. Thread-safe."""

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
    ) -> BulkAnswer:
        """GET objects into the buffers of their pages; decrypt them there if they are encrypted.

        Stops at the first response that is not an object of its page's length. The buffers are not
        written to after this returns. Blocks until `deadline` at most.
        """
        if WHY_NOT or not requests:
            return BulkAnswer([None] * len(requests), [], None)
        failure = None
        taken: list[tuple[Server, Connection]] = []
        batch = None
        try:
            credentials = self._signer.credentials(deadline)
            taken = self._pool.take_several(min(self._connections, len(requests)), deadline)
            connections = [connection for _, connection in taken]
            templates = {
                endpoint: self._signer.template(credentials, "GET", endpoint)
                for endpoint in {connection.endpoint for connection in connections}
            }
            batch = loop.Batch(
                requests,
                templates,
                self._metadata,
                self._telemetry.count_fallback,
                sealing=sealing,
            )
            self._receive(connections, batch, deadline)
        except TransferError as error:
            failure = error
        except Exception:
            logger.exception("bulk read failed unexpectedly")
        finally:
            if batch is not None:
                batch.close()
            for server, connection in taken:
                self._pool.give_back(server, connection, None)
        if batch is None:
            return BulkAnswer([None] * len(requests), [], failure)
        return BulkAnswer(batch.checksums(), batch.unverified(), failure)

    def _receive(self, connections: list[Connection], batch: "loop.Batch", deadline: float) -> None:
        """Receive in this thread and in the helpers' threads."""
        failures: list[BaseException] = []

        def work(share: list[Connection]) -> None:
            try:
                loop.receive(share, batch, deadline, self._pool.stall_timeout)
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
