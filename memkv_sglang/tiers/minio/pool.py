"""Kept-alive connections, spread evenly over the servers that answer."""

import itertools
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from memkv_sglang.tiers.minio.addresses import Addresses
from memkv_sglang.tiers.minio.connection import Connection
from memkv_sglang.tiers.minio.endpoints import Endpoint
from memkv_sglang.tiers.minio.errors import (
    ConnectError,
    OutOfTimeError,
    StatusError,
)
from memkv_sglang.tiers.minio.transport import connect

AVOID_FOR = 5.0
"""Seconds for which a server that could not be reached gets no requests, if there are others."""


LONGEST_REST = 5.0
"""Seconds for which a server is left alone at most, however long it asks for.

MinIO says 60 s (`Retry-After`) in each 503, also in those of the second in which it starts.
"""


class _Server:
    """An endpoint with its idle connections, the last used one last."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.addresses = Addresses(endpoint.host, endpoint.port)
        self.idle: list[Connection] = []
        self.avoid_until = 0.0
        self.rest_until = 0.0
        self.round_trip: float | None = None


class ConnectionPool:
    """Lends connections, each to one thread at a time. Safe for any number of threads."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        context: ssl.SSLContext | None,
        connect_timeout: float,
        stall_timeout: float,
        keep: int,
    ) -> None:
        """Lend connections to the endpoints, keep at most `keep` idle ones of each."""
        self._servers = [_Server(endpoint) for endpoint in endpoints]
        self._context = context
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._keep = keep
        self._turn = itertools.count()
        self._lent = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def round_trip(self) -> float:
        """Seconds of the shortest connect so far, 0 before the first: the network's share."""
        return min((s.round_trip for s in self._servers if s.round_trip is not None), default=0.0)

    @contextmanager
    def lend(self, deadline: float, *, fresh: bool = False) -> Iterator[Connection]:
        """Lend a connection; it is closed if the block raises or leaves it in mid-response.

        `fresh`: opened now. Blocks for a connect at most. Raises `ConnectError` if no server can
        be reached or each asked for a rest, `OutOfTimeError`.
        """
        with self._changed:
            if self._closed:
                raise ConnectError("the tier is closed")
            self._lent += 1
        try:
            server, connection = self._take(deadline, fresh)
            try:
                yield connection
            except StatusError as error:
                self._put_back(server, connection)  # an answer like any other
                if error.retry_after:
                    rest = min(error.retry_after, LONGEST_REST)
                    server.rest_until = time.monotonic() + rest
                raise
            except BaseException:
                connection.close()
                if connection.stalled:
                    self._avoid(server)
                raise
            self._put_back(server, connection)
        finally:
            with self._changed:
                self._lent -= 1
                self._changed.notify_all()

    def idle(self) -> int:
        """Return how many connections wait for use."""
        with self._changed:
            return sum(len(server.idle) for server in self._servers)

    def close(self) -> None:
        """Wait for lent connections, close all; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self._lent == 0)
            for server in self._servers:
                while server.idle:
                    server.idle.pop().close()

    def _take(self, deadline: float, fresh: bool) -> tuple[_Server, Connection]:
        failure = ConnectError("every server asked to be left alone for a while")
        for server in self._in_turn():
            if not fresh and (connection := self._pop_idle(server)):
                return server, connection
            try:
                return server, self._connect(server, deadline)
            except ConnectError as error:
                self._avoid(server)
                failure = error
        raise failure

    def _in_turn(self) -> list[_Server]:
        """Return the servers in the order to try: every call begins with the next one."""
        now = time.monotonic()
        awake = [s for s in self._servers if s.rest_until <= now]
        servers = [s for s in awake if s.avoid_until <= now] or awake
        first = next(self._turn) % max(len(servers), 1)
        return servers[first:] + servers[:first]

    def _pop_idle(self, server: _Server) -> Connection | None:
        while True:
            with self._changed:
                connection = server.idle.pop() if server.idle else None
            if connection is None or connection.quiet():
                return connection
            connection.close()

    def _put_back(self, server: _Server, connection: Connection) -> None:
        with self._changed:
            kept = connection.reusable and not self._closed and len(server.idle) < self._keep
            if kept:
                connection.reused = True
                server.idle.append(connection)
        if not kept:
            connection.close()

    def _connect(self, server: _Server, deadline: float) -> Connection:
        endpoint, begin = server.endpoint, time.monotonic()
        if begin >= deadline:
            raise OutOfTimeError("the deadline came first")
        timeout = min(self._connect_timeout, deadline - begin)
        context = self._context if endpoint.scheme == "https" else None
        try:
            addresses = server.addresses.get(timeout)
            left = timeout - (time.monotonic() - begin)
            transport = connect(addresses, endpoint.host, left, context)
        except OSError as error:
            if time.monotonic() >= deadline:
                raise OutOfTimeError("the deadline came first") from error
            raise ConnectError(f"{endpoint.url}: {error}") from error
        took = time.monotonic() - begin
        server.round_trip = min(took, server.round_trip or took)
        return Connection(endpoint, transport, self._stall_timeout)

    def _avoid(self, server: _Server) -> None:
        with self._changed:
            server.avoid_until = time.monotonic() + AVOID_FOR
            while server.idle:
                server.idle.pop().close()
