"""A session with one agent process: connections that calls take and give back."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memkv_sglang.client.connection import (
    AgentRefusedError,
    Connection,
    ConnectionLostError,
)

CONNECT_LIMIT = 1.0
"""Seconds for the agent to take a connection."""


class Link:
    """Thread-safe. Each call has a connection of its own while it lasts."""

    def __init__(self, path: Path) -> None:
        """Open a session; raises `AgentRefusedError` or `OSError`."""
        self._path = path
        self.first = Connection(path, b"", time.monotonic() + CONNECT_LIMIT)
        """Stays open as long as the link, so that the agent keeps the session's pools."""
        self._idle: deque[Connection] = deque()
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Take a connection for one call; one that raised anything is closed, not used again.

        Raises `AgentRefusedError` if the agent takes no more now, `ConnectionLostError` if it does
        not answer.
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

    def _take(self) -> Connection:
        with suppress(IndexError):
            return self._idle.pop()
        try:
            return Connection(self._path, self.first.session, time.monotonic() + CONNECT_LIMIT)
        except BlockingIOError:
            raise AgentRefusedError("too many connect to the agent at this moment") from None
        except OSError as error:
            raise ConnectionLostError(str(error)) from None

    def close(self) -> None:
        """Close the connections that no call has, the others when their calls end; idempotent."""
        self._closed = True
        self._close_idle()
        self.first.close()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()
