"""Sessions: what the connections of one client have in common."""

import secrets
import threading
import time

from memkv_sglang.agent.pools import PoolBudget, Pools, RequestError

_TOKEN_SIZE = 16

MAX_DESCRIPTIONS = 1024
"""Descriptions of namespaces that a session may send at once; a server has one a pool."""

SECONDS_A_DESCRIPTION = 10.0
"""It may send one more each time these have passed: weights may be updated as long as it lasts."""

STARTER_SECONDS = 5.0
"""A new agent waits for its starter so long before it can be retired: else two servers that want
different settings could end each other's agents for ever."""


class Session:
    """A client's pools, kept as long as one of its connections is open."""

    def __init__(self, pools: Pools) -> None:
        """Make a token that nobody can guess."""
        self.token = secrets.token_bytes(_TOKEN_SIZE)
        self.pools = pools
        self.connections = 0
        self.joined = False
        """Whether its client needs this agent; others only look."""
        self._lock = threading.Lock()
        self._descriptions_left = float(MAX_DESCRIPTIONS)
        self._counted = time.monotonic()

    def count_description(self) -> None:
        """Count one that its client sends; raises `RequestError` if these are too many by now."""
        with self._lock:
            now = time.monotonic()
            more = (now - self._counted) / SECONDS_A_DESCRIPTION
            self._descriptions_left = min(self._descriptions_left + more, MAX_DESCRIPTIONS)
            self._counted = now
            if self._descriptions_left < 1:
                raise RequestError(
                    f"a session may describe {MAX_DESCRIPTIONS} namespaces at once, then one every "
                    f"{SECONDS_A_DESCRIPTION:g} s"
                )
            self._descriptions_left -= 1


class Sessions:
    """All sessions of the agent. Thread-safe."""

    def __init__(self) -> None:
        """Start without any."""
        self._lock = threading.Lock()
        self._budget = PoolBudget()
        self._sessions: dict[bytes, Session] = {}
        self._retired = False
        self._began = time.monotonic()
        self._ever_joined = False

    def enter(self, token: bytes, pid: int) -> Session:
        """Open a session for a process if the token is empty, else join one.

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
            raise RequestError("there is no such session")
        return session

    def leave(self, session: Session) -> None:
        """Count one connection less; with the last one the session ends, and so do its pools."""
        with self._lock:
            session.connections -= 1
            if session.connections == 0:
                del self._sessions[session.token]

    def join(self, session: Session) -> None:
        """Count the session as one that needs this agent. Raises `RequestError`."""
        with self._lock:
            self._refuse_if_retired()
            session.joined = self._ever_joined = True

    def retire(self) -> None:
        """Let no session begin any more. Raises `RequestError` if a client needs the agent.

        Both at once, so that no client joins an agent that is about to end.
        """
        with self._lock:
            users = sum(session.joined for session in self._sessions.values())
            if users:
                raise RequestError(f"it serves {users} other client{'s' * (users > 1)}")
            if not self._ever_joined and time.monotonic() - self._began < STARTER_SECONDS:
                raise RequestError("another server has just started it")
            self._retired = True

    def _refuse_if_retired(self) -> None:
        if self._retired:
            raise RequestError("the agent is about to end")

    def snapshot(self) -> list[Session]:
        """Return the sessions of the moment."""
        with self._lock:
            return list(self._sessions.values())
