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
from memkv_sglang.agent.connection import ClientConnection
from memkv_sglang.agent.lifetime import Lifetime
from memkv_sglang.agent.peer import Peer, peer_of
from memkv_sglang.agent.protocol import Refused
from memkv_sglang.agent.sessions import Sessions
from memkv_sglang.agent.wire import encode_frame

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Connections at a time, a thread each; a client has as many as it has calls in flight, plus one.
"""

MAX_CONNECTIONS_OF_PROCESS = 192
"""Of these, those of one process, so that none can shut the others out."""


class Server:
    """The open connections. Thread-safe."""

    def __init__(self, calls: Calls, sessions: Sessions) -> None:
        """Serve requests by `calls`. Raises `OSError`."""
        self._lifetime = Lifetime()
        self._calls = calls
        self._sessions = sessions
        self._lock = threading.Lock()
        self._connections: set[ClientConnection] = set()
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
        """Take a new connection, in blocking mode; returns at once.

        Raises `RuntimeError` if there is no thread to be had, `OSError` if the peer is gone.
        """
        peer = peer_of(sock)
        if peer.uid != os.getuid():
            log.warning("connection of another user refused", extra={"fields": peer._asdict()})
            sock.close()
            return
        with self._lock:
            refusal = self._refusal or self._find_too_many(peer)
            if not refusal:
                connection = ClientConnection(
                    sock, peer, self._calls, self._sessions, self._lifetime, self._forget
                )
                self._connections.add(connection)
        if refusal:
            fields = {**peer._asdict(), "reason": refusal}
            log.warning("connection refused", extra={"fields": fields})
            _refuse(sock, refusal)
            return
        try:
            connection.start()
        except RuntimeError:
            with self._lock:
                self._connections.discard(connection)
            raise

    def _find_too_many(self, peer: Peer) -> str:
        """Return why the peer gets no further connection; empty if it does. Needs the lock.

        Processes that cannot be seen from here share the number 0, and count as one.
        """
        if len(self._connections) >= MAX_CONNECTIONS:
            return f"the agent has {MAX_CONNECTIONS} connections already"
        own = sum(connection.peer.pid == peer.pid for connection in self._connections)
        if own >= MAX_CONNECTIONS_OF_PROCESS:
            return f"process {peer.pid} has {MAX_CONNECTIONS_OF_PROCESS} connections already"
        return ""

    def _forget(self, connection: ClientConnection) -> None:
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
