"""A session with one agent process, and its pool of connections."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memkv_sglang.client.connection import (
    AgentConnection,
    AgentRefusedError,
    ConnectionLostError,
)

CONNECT_LIMIT = 1.0
"""Seconds to wait for a connection."""


class Link:
    """A pool of connections to one agent: each call uses one exclusively. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open a session. Raises `AgentRefusedError` or `OSError`."""
        self._path = path
        self.first = AgentConnection(path, b"", time.monotonic() + CONNECT_LIMIT)
        """Stays open until `close`, which keeps the session's pools registered with the agent."""
        self._idle: deque[AgentConnection] = deque()
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[AgentConnection]:
        """Provide a connection for one call, and close it if the call raises anything.

        Raises `AgentRefusedError` if the agent accepts no more connections, `ConnectionLostError`
        if it does not answer.
        """
        connection = self._take()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        if self._closed:
            self._close_idle()

    def _take(self) -> AgentConnection:
        with suppress(IndexError):
            return self._idle.pop()
        try:
            return AgentConnection(self._path, self.first.session, time.monotonic() + CONNECT_LIMIT)
        except BlockingIOError:
            raise AgentRefusedError(
                "too many clients are connecting to the agent; retry later"
            ) from None
        except OSError as error:
            raise ConnectionLostError(str(error)) from None

    def close(self) -> None:
        """Close idle connections now and busy ones when their calls end. Idempotent."""
        self._closed = True
        self._close_idle()
        self.first.close()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()
