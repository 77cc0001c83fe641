"""Resolve a server's addresses in the background, so that a slow resolver delays no request."""

import socket
import time
from typing import Any

from memkv_sglang.tiers.minio.http.background import BackgroundCall

REFRESH_AFTER = 30.0
"""Seconds after which addresses are resolved again."""

Address = tuple[socket.AddressFamily, socket.SocketKind, int, Any]
"""Family, type and protocol of a socket, and the address to connect to."""


class Addresses:
    """The last successfully resolved addresses of one host. Thread-safe."""

    def __init__(self, host: str, port: int) -> None:
        """Resolve on first use."""
        self._host = host
        self._port = port
        self._known: list[Address] = []
        self._refresh_at = 0.0
        self._resolution = BackgroundCall(self._resolve)

    def get(self, timeout: float) -> list[Address]:
        """Return the addresses, perhaps stale ones. Blocks only for the first resolution.

        Raises `OSError`, or `TimeoutError` after `timeout` seconds.
        """
        if time.monotonic() < self._refresh_at:
            return self._known
        resolution = self._resolution.begin()
        return self._known or resolution.result(timeout)

    def _resolve(self) -> list[Address]:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"{self._host!r} is not a host name") from error
        self._known = [(family, kind, number, where) for family, kind, number, _, where in found]
        self._refresh_at = time.monotonic() + REFRESH_AFTER
        return self._known
