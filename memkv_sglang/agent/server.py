"""The agent's server, which runs one thread per connection.

Calls block on disks and sockets with the GIL released, so they need threads anyway. An event loop
would only add a handover to each call.
"""

import logging
import os
import socket
import threading
import time
from contextlib import suppress

from memkv_sglang.agent.calls import Calls
from memkv_sglang.agent.connection import ClientConnection
from memkv_sglang.agent.lifetime import Lifetime, LifetimeMemory
from memkv_sglang.agent.peer import Peer, peer_of
from memkv_sglang.agent.protocol import Refused
from memkv_sglang.agent.sessions import Sessions
from memkv_sglang.agent.wire import encode_frame

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Maximum open connections. A client has one per call in flight, plus one."""

MAX_CONNECTIONS_OF_PROCESS = 192
"""Maximum open connections of one process, so that it cannot lock others out."""


class Server:
    """Owns the open connections. Thread-safe."""

    def __init__(
        self, calls: Calls, sessions: Sessions, lifetime: LifetimeMemory | None = None
    ) -> None:
        """Let `calls` handle the requests. `lifetime`: see `Lifetime`. Raises `OSError`."""
        self._lifetime = Lifetime(lifetime)
        self._calls = calls
        self._sessions = sessions
        self._lock = threading.Lock()
        self._connections: set[ClientConnection] = set()
        self._refusal = ""
        self._last_busy = time.monotonic()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last connection closed; 0 while one is open."""
        return 0.0 if self._connections else time.monotonic() - self._last_busy

    def accept(self, sock: socket.socket) -> None:
        """Serve a new connection, whose socket is in blocking mode. Returns at once.

        Raises `RuntimeError` if no thread can be started, `OSError` if the peer has gone.
        """
        peer = peer_of(sock)
        if peer.uid != os.getuid():
            log.warning("connection from another user refused", extra={"fields": peer._asdict()})
            sock.close()
            return
        with self._lock:
            refusal = self._refusal or self._over_limit(peer)
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

    def _over_limit(self, peer: Peer) -> str:
        """Return why the peer may not connect again; empty if it may. Call with the lock held.

        Processes in other pid namespaces have pid 0 and count as one.
        """
        if len(self._connections) >= MAX_CONNECTIONS:
            return f"the agent already has {MAX_CONNECTIONS} connections"
        own = sum(connection.peer.pid == peer.pid for connection in self._connections)
        if own >= MAX_CONNECTIONS_OF_PROCESS:
            return f"process {peer.pid} already has {MAX_CONNECTIONS_OF_PROCESS} connections"
        return ""

    def _forget(self, connection: ClientConnection) -> None:
        with self._lock:
            self._connections.discard(connection)
            self._last_busy = time.monotonic()

    def stop(self, reason: str, limit: float) -> bool:
        """Refuse new calls and wait for loads and spills in flight.

        Returns False if some have not ended after `limit` seconds. Other calls may take longer;
        wait for them with `join`.
        """
        with self._lock:
            self._refusal = reason
            connections = list(self._connections)
        for connection in connections:
            connection.stop_receiving()
        deadline = time.monotonic() + limit
        return all(connection.wait_for_buffers(deadline) for connection in connections)

    def join(self, limit: float) -> bool:
        """After `stop`, wait for all other calls.

        Returns False if some have not ended after `limit` seconds.
        """
        with self._lock:
            connections = list(self._connections)
        deadline = time.monotonic() + limit
        return all(connection.join(deadline) for connection in connections)


def _refuse(sock: socket.socket, reason: str) -> None:
    with sock, suppress(OSError):
        sock.sendall(encode_frame(Refused(reason)))
