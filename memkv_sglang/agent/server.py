"""The agent's server: accepts connections and gives each a thread of its own.

Calls run in threads because that is what they need anyway: they block on disks and sockets with
the GIL released, and an event loop would only add a hand-over to each.
"""

import logging
import os
import socket
import threading
import time
from contextlib import suppress

from memkv_sglang.agent.calls import Calls
from memkv_sglang.agent.connection import Connection
from memkv_sglang.agent.peer import peer_of
from memkv_sglang.agent.protocol import Refused
from memkv_sglang.agent.sessions import Sessions
from memkv_sglang.agent.wire import encode_frame

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Connections at a time, a thread each; a client has as many as it has calls in flight, plus one.
"""


class Server:
    """The open connections. Thread-safe."""

    def __init__(self, calls: Calls, sessions: Sessions) -> None:
        """Serve requests by `calls`."""
        self._calls = calls
        self._sessions = sessions
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._refusal = ""
        self._last_busy = time.monotonic()

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    @property
    def idle_seconds(self) -> float:
        """How long there has been no connection."""
        return 0.0 if self._connections else time.monotonic() - self._last_busy

    def accept(self, sock: socket.socket) -> None:
        """Take a new connection, in blocking mode; returns at once."""
        peer = peer_of(sock)
        if peer.uid != os.getuid():
            log.warning("connection of another user refused", extra={"fields": peer._asdict()})
            sock.close()
            return
        with self._lock:
            refusal = self._refusal
            if not refusal and len(self._connections) >= MAX_CONNECTIONS:
                refusal = f"the agent has {MAX_CONNECTIONS} connections already"
            if not refusal:
                connection = Connection(sock, peer, self._calls, self._sessions, self._forget)
                self._connections.add(connection)
        if refusal:
            _refuse(sock, refusal)
        else:
            connection.start()

    def _forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)
            self._last_busy = time.monotonic()

    def stop(self, reason: str, limit: float) -> bool:
        """Refuse what comes from now on, and wait for the loads and spills in flight.

        Returns False if some of them have not ended after `limit` seconds. Other calls, which may
        take longer than that, go on: see `join`.
        """
        with self._lock:
            self._refusal = reason
            connections = list(self._connections)
        for connection in connections:
            connection.stop_receiving()
        deadline = time.monotonic() + limit
        return all(connection.wait_for_pages(deadline) for connection in connections)

    def join(self, limit: float) -> bool:
        """After `stop`: wait for the rest of the calls; False after `limit` seconds."""
        with self._lock:
            connections = list(self._connections)
        deadline = time.monotonic() + limit
        return all(connection.join(deadline) for connection in connections)


def _refuse(sock: socket.socket, reason: str) -> None:
    with sock, suppress(OSError):
        sock.sendall(encode_frame(Refused(reason)))
