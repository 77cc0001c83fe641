"""Sessions: the state that all connections of one client share."""

import secrets
import threading
import time

from memkv_sglang.agent.pools import PoolBudget, Pools, RequestError

_TOKEN_SIZE = 16

MAX_DESCRIPTIONS = 1024
"""Maximum namespace descriptions that a session may send at once. A server has one per pool."""

DESCRIPTION_INTERVAL = 10.0
"""Seconds until a session may send another description. Each weight update creates new ones."""

STARTER_GRACE = 5.0
"""Seconds during which a new agent cannot be retired unless its starter has joined. Otherwise two
servers with different settings could keep stopping each other's agents."""


class Session:
    """A client's pools, kept while any of its connections is open."""

    def __init__(self, pools: Pools) -> None:
        """Create a session with a random token."""
        self.token = secrets.token_bytes(_TOKEN_SIZE)
        self.pools = pools
        self.connections = 0
        self.joined = False
        """Whether the client uses the agent, rather than only observing it."""
        self._lock = threading.Lock()
        self._descriptions_left = float(MAX_DESCRIPTIONS)
        self._counted = time.monotonic()

    def count_description(self) -> None:
        """Count a description that the client sent. Raises `RequestError` over the rate limit."""
        with self._lock:
            now = time.monotonic()
            refill = (now - self._counted) / DESCRIPTION_INTERVAL
            self._descriptions_left = min(self._descriptions_left + refill, MAX_DESCRIPTIONS)
            self._counted = now
            if self._descriptions_left < 1:
                raise RequestError(
                    f"a session may describe {MAX_DESCRIPTIONS} namespaces at once, then one every "
                    f"{DESCRIPTION_INTERVAL:g} s"
                )
            self._descriptions_left -= 1


class Sessions:
    """All sessions of the agent. Thread-safe."""

    def __init__(self) -> None:
        """Start without sessions."""
        self._lock = threading.Lock()
        self._budget = PoolBudget()
        self._sessions: dict[bytes, Session] = {}
        self._retired = False
        self._began = time.monotonic()
        self._ever_joined = False

    def enter(self, token: bytes, pid: int) -> Session:
        """Open a session for process `pid` if the token is empty, else add a connection to one.

        Raises `RequestError`.
        """
        with self._lock:
            self._refuse_if_retired()
            session = self._find(token) if token else Session(Pools(self._budget, pid))
            self._sessions[session.token] = session
            session.connections += 1
            return session

    def _find(self, token: bytes) -> Session:
        session = self._sessions.get(token)
        if session is None:
            raise RequestError("unknown session")
        return session

    def leave(self, session: Session) -> None:
        """Remove a connection. The session and its pools end with the last one."""
        with self._lock:
            session.connections -= 1
            if session.connections == 0:
                del self._sessions[session.token]

    def join(self, session: Session) -> None:
        """Count the session as a user of this agent. Raises `RequestError`."""
        with self._lock:
            self._refuse_if_retired()
            session.joined = self._ever_joined = True

    def retire(self) -> None:
        """Accept no more sessions. Raises `RequestError` if a client uses the agent.

        Both happen atomically, so no client can join an agent that is about to stop.
        """
        with self._lock:
            users = sum(session.joined for session in self._sessions.values())
            if users:
                raise RequestError(f"it serves {users} other client{'s' * (users > 1)}")
            if not self._ever_joined and time.monotonic() - self._began < STARTER_GRACE:
                raise RequestError("another server has just started it")
            self._retired = True

    def _refuse_if_retired(self) -> None:
        if self._retired:
            raise RequestError("the agent is stopping")

    def snapshot(self) -> list[Session]:
        """Return the current sessions."""
        with self._lock:
            return list(self._sessions.values())
