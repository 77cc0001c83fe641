"""Many objects read at once, as long as each of them is as it should be.

Needs the compiled `loop`; where there is none, whoever calls reads them one by one.
"""

import logging
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.auth.signing import Signer
from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.http.errors import TransferError
from memkv_sglang.tiers.minio.http.pool import ConnectionPool, Server
from memkv_sglang.tiers.minio.objects.bulk import Response, Source
from memkv_sglang.tiers.minio.objects.bulk_requests import Requests

# WHY_NOT tells why there is no loop, so that nothing is read by it; it is empty if there is one.
try:
    from memkv_sglang.tiers.minio.http import receive_loop as loop
except ImportError as error:  # there was no compiler, or no xxhash that exports its functions
    WHY_NOT = str(error)
else:
    WHY_NOT = ""

logger = logging.getLogger(__name__)


class BulkAnswer(NamedTuple):
    """What came of the objects that were asked for."""

    responses: list[Response]
    failure: TransferError | None
    """Why the rest need not be tried one by one, None if they should be."""


class BulkReader:
    """Reads for one call at a time. Safe for any number of threads."""

    def __init__(self, pool: ConnectionPool, *, connections: int) -> None:
        """Use up to so many of the pool's connections, and a thread for two cores.

        The caller's is the first of them. Where cores are scarce, handing over between threads
        costs more than they bring.
        """
        self._pool = pool
        self._connections = connections
        self._threads = max((os.cpu_count() or 1) // 2, 1)
        self._busy = threading.Lock()

    def read(
        self, signer: Signer, objects: Sequence[tuple[str, Page]], deadline: float
    ) -> BulkAnswer:
        """GET objects, by their names, into the buffers of their pages.

        Stops at whatever is not an object of its page's length. Does nothing while another call is
        read for, or while there are not enough open connections: whoever reads page by page opens
        them all at once. Nothing writes to the buffers any more when this returns. Blocks until
        `deadline` at most.
        """
        responses: list[Response] = []
        if WHY_NOT or not objects or not self._busy.acquire(blocking=False):
            return BulkAnswer(responses, None)
        lent: list[tuple[Server, Connection]] = []
        try:
            lent = self._pool.take_idle(min(self._connections, len(objects)))
            if lent:
                requests = Requests(signer, objects, deadline)
                self._receive([connection for _, connection in lent], requests, responses, deadline)
        except TransferError as error:
            return BulkAnswer(responses, error)
        except Exception:
            logger.exception("bulk read failed unexpectedly")
        finally:
            for server, connection in lent:
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
        source = Source(requests.take, requests.stop, responses.append)
        failures: list[BaseException] = []

        def work(share: list[Connection]) -> None:
            try:
                loop.receive(share, source, deadline, self._pool.stall_timeout)
            except BaseException as error:
                requests.stop()
                failures.append(error)
                if not isinstance(error, TransferError):  # which leaves nothing under way
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
