"""A pool of persistent connections, which are spread evenly over the reachable servers."""

import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from memkv_sglang.tiers.minio.http.addresses import Addresses
from memkv_sglang.tiers.minio.http.connection import Connection
from memkv_sglang.tiers.minio.http.endpoints import Endpoint
from memkv_sglang.tiers.minio.http.errors import (
    ConnectError,
    OutOfTimeError,
    StatusError,
)
from memkv_sglang.tiers.minio.http.explain import unreachable
from memkv_sglang.tiers.minio.http.tls import ContextSource
from memkv_sglang.tiers.minio.http.transport import connect

AVOID_FOR = 5.0
"""Seconds for which an unreachable server gets no requests, if there are other servers."""


LONGEST_REST = 5.0
"""Maximum seconds to back off from a server, even if it asks for more.

MinIO asks for 60 s (`Retry-After`) in each 503, even during the second in which it starts.
"""


IDLE_TIMEOUT = 60.0
"""Default seconds of idleness after which a connection is not reused."""


class Server:
    """An endpoint and its idle connections. The last one was used most recently."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.addresses = Addresses(endpoint.host, endpoint.port)
        self.idle: list[Connection] = []
        self.avoid_until = 0.0
        self.rest_until = 0.0
        self.round_trip: float | None = None


class ConnectionPool:
    """Lends connections, each to one thread at a time. Thread-safe."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        context: ContextSource | None,
        connect_timeout: float,
        stall_timeout: float,
        idle_timeout: float = IDLE_TIMEOUT,
        keep: int,
    ) -> None:
        """Keep at most `keep` idle connections to each endpoint.

        Connections that were idle for `idle_timeout` seconds are closed.
        """
        self._servers = [Server(endpoint) for endpoint in endpoints]
        self._context = context
        self._connect_timeout = connect_timeout
        self.stall_timeout = stall_timeout
        self._idle_timeout = idle_timeout
        self._keep = keep
        self._turn = itertools.count()
        self._lent = 0
        self._out: set[Connection] = set()
        """Connections that are lent now."""
        self._opener = ThreadPoolExecutor(keep, thread_name_prefix="memkv-connect")
        self._closed = False
        self._aborted = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def round_trip(self) -> float:
        """Shortest time to connect so far, in seconds; 0 before the first connection."""
        return min((s.round_trip for s in self._servers if s.round_trip is not None), default=0.0)

    def lend(self, deadline: float, *, fresh: bool = False) -> "_Loan":
        """Lend a connection for a `with` block. `fresh` opens a new one.

        It is closed if the block raises, or ends before the response was read. Entering the block
        may block to connect. Raises `OutOfTimeError`, and `ConnectError` if no server can be
        reached or all servers asked clients to back off.
        """
        return _Loan(self, deadline, fresh)

    def take(self, deadline: float, fresh: bool) -> tuple[Server, Connection]:
        """Take a connection. The caller must `give_back` it."""
        with self._lock:
            if self._closed:
                raise ConnectError("the tier is closed")
            self._lent += 1
        try:
            server, connection = self._find(deadline, fresh)
        except BaseException:
            self._give_up()
            raise
        self._lend_out([connection])
        return server, connection

    def take_several(self, count: int, deadline: float) -> list[tuple[Server, Connection]]:
        """Take up to `count` connections, spread over the servers. The caller gives each back.

        Opens missing connections, but waits for them only if no connection is idle. Otherwise the
        next call gets them. Returns at least one. Raises as `take` does.
        """
        servers = self._in_turn()
        order = [servers[number % len(servers)] for number in range(count if servers else 0)]
        with self._lock:
            if self._closed:
                raise ConnectError("the tier is closed")
            self._lent += count
            popped = [(server, self._pop_fresh(server)) for server in order]
        taken: list[tuple[Server, Connection]] = []
        opening: list[tuple[Server, Future[Connection]]] = []
        for server, connection in popped:
            if connection and not connection.is_idle():
                connection.close()
                connection = self._pop_idle(server)
            if connection:
                taken.append((server, connection))
            else:
                opening.append((server, self._opener.submit(self._open, server, deadline)))
        for _ in range(count - len(taken) - len(opening)):
            self._give_up()
        if taken:
            self._lend_out(connection for _, connection in taken)
            for server, future in opening:
                future.add_done_callback(partial(self._keep_opened, server))
            return taken
        return self._wait_for_opened(opening)

    def _open(self, server: Server, deadline: float) -> Connection:
        try:
            return self._connect(server, deadline)
        except ConnectError:
            self._avoid(server)
            raise

    def _keep_opened(self, server: Server, future: "Future[Connection]") -> None:
        if future.exception() is None:
            self.give_back(server, future.result(), None)
        else:
            self._give_up()

    def _wait_for_opened(
        self, opening: list[tuple[Server, "Future[Connection]"]]
    ) -> list[tuple[Server, Connection]]:
        taken: list[tuple[Server, Connection]] = []
        failure: BaseException = _all_resting()
        for server, future in opening:
            if error := future.exception():
                failure = error
                self._give_up()
            else:
                taken.append((server, future.result()))
        if not taken:
            raise failure
        self._lend_out(connection for _, connection in taken)
        return taken

    def give_back(
        self, server: Server, connection: Connection, error: BaseException | None
    ) -> None:
        """Take back a connection whose user raised `error`. A `StatusError` does not close it."""
        if isinstance(error, StatusError):
            if error.retry_after:
                server.rest_until = time.monotonic() + min(error.retry_after, LONGEST_REST)
        elif error is not None:
            connection.close()
        self.give_back_several([(server, connection)])

    def give_back_several(self, lent: Sequence[tuple[Server, Connection]]) -> None:
        """Take back connections. Those that are not reusable are closed."""
        for server, connection in lent:
            if connection.stalled:
                self._avoid(server)
        now = time.monotonic()
        with self._lock:
            for server, connection in lent:
                self._out.discard(connection)
                if connection.stale:  # its idle neighbours are probably dead too
                    _close_all(server.idle)
                if connection.reusable and not self._closed and len(server.idle) < self._keep:
                    connection.reused = True
                    connection.idle_since = now
                    server.idle.append(connection)
                else:
                    connection.close()
                self._end_loan()

    def idle(self) -> int:
        """Return the number of idle connections."""
        with self._lock:
            return sum(len(server.idle) for server in self._servers)

    def close(self) -> None:
        """Wait for lent connections, then close all connections. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._lent == 0)
            for server in self._servers:
                _close_all(server.idle)
        self._opener.shutdown()

    def abort(self) -> None:
        """Abort requests in flight and close all connections. Does not block."""
        with self._lock:
            self._closed = self._aborted = True
            for connection in list(self._out):
                connection.interrupt()
            for server in self._servers:
                while server.idle:
                    server.idle.pop().close()

    def _lend_out(self, connections: Iterable[Connection]) -> None:
        with self._lock:
            for connection in connections:
                self._out.add(connection)
                if self._aborted:
                    connection.interrupt()

    def _give_up(self) -> None:
        """End the loan of a connection that could not be opened."""
        with self._lock:
            self._end_loan()

    def _end_loan(self) -> None:
        self._lent -= 1
        if self._closed:
            self._changed.notify_all()

    def _find(self, deadline: float, fresh: bool) -> tuple[Server, Connection]:
        failure = _all_resting()
        for server in self._in_turn():
            if not fresh and (connection := self._pop_idle(server)):
                return server, connection
            try:
                return server, self._connect(server, deadline)
            except ConnectError as error:
                self._avoid(server)
                failure = error
        raise failure

    def _in_turn(self) -> list[Server]:
        """Return the servers in the order to try them, which each call rotates by one."""
        now = time.monotonic()
        awake = [s for s in self._servers if s.rest_until <= now]
        servers = [s for s in awake if s.avoid_until <= now] or awake
        first = next(self._turn) % max(len(servers), 1)
        return servers[first:] + servers[:first]

    def _pop_idle(self, server: Server) -> Connection | None:
        while True:
            with self._lock:
                connection = self._pop_fresh(server)
            if connection is None or connection.is_idle():
                return connection
            connection.close()

    def _pop_fresh(self, server: Server) -> Connection | None:
        """Return a connection that was not idle for too long; it may be closed. Needs the lock."""
        connection = server.idle.pop() if server.idle else None
        if connection and time.monotonic() - connection.idle_since >= self._idle_timeout:
            connection.close()
            _close_all(server.idle)  # idle for even longer
            return None
        return connection

    def _connect(self, server: Server, deadline: float) -> Connection:
        endpoint, begin = server.endpoint, time.monotonic()
        if begin >= deadline:
            raise OutOfTimeError("the deadline passed")
        timeout = min(self._connect_timeout, deadline - begin)
        context = self._context() if self._context and endpoint.scheme == "https" else None
        try:
            addresses = server.addresses.get(timeout)
            left = timeout - (time.monotonic() - begin)
            transport = connect(addresses, endpoint.host, left, context)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise OutOfTimeError("the deadline passed") from error
            raise ConnectError(str(unreachable(endpoint.url, error))) from error
        took = time.monotonic() - begin
        server.round_trip = min(took, server.round_trip or took)
        return Connection(endpoint, transport, self.stall_timeout)

    def _avoid(self, server: Server) -> None:
        with self._lock:
            server.avoid_until = time.monotonic() + AVOID_FOR
            _close_all(server.idle)


def _all_resting() -> ConnectError:
    return ConnectError("every server asked clients to back off")


def _close_all(connections: list[Connection]) -> None:
    while connections:
        connections.pop().close()


class _Loan:
    """A context manager for a lent connection. A class, because a generator costs more per page."""

    def __init__(self, pool: ConnectionPool, deadline: float, fresh: bool) -> None:
        self._pool, self._deadline, self._fresh = pool, deadline, fresh

    def __enter__(self) -> Connection:
        self._server, self._connection = self._pool.take(self._deadline, self._fresh)
        return self._connection

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._pool.give_back(self._server, self._connection, error)
