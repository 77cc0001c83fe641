"""`/healthz`, `/readyz` and `/metrics` on a loopback port."""

import asyncio
import socket
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from memkv_sglang.config.errors import ConfigError

_HOST = "127.0.0.1"

REQUEST_LIMIT = 5.0
"""Seconds for a client to send its request and receive the response."""

_MAX_HEAD = 16 << 10

Answer = tuple[str, str, bytes]
"""Status, content type, body."""

_TEXT = "text/plain; charset=utf-8"


class HttpServer:
    """Serves GET requests in the event loop, one per connection."""

    def __init__(
        self, port: int, registry: CollectorRegistry, refresh: Callable[[], object]
    ) -> None:
        """Bind the port. Each scrape first calls `refresh`. Raises `ConfigError`."""
        self.ready = False
        """What `/readyz` reports."""
        self._registry = registry
        self._refresh = refresh
        try:
            self._socket = socket.create_server((_HOST, port))
        except OSError as error:
            raise ConfigError(
                f"agent.http_port: cannot listen on {_HOST}:{port} ({error.strerror}); "
                "set another port, or 0 to use a free one"
            ) from None
        self.port: int = self._socket.getsockname()[1]

    async def start(self) -> None:
        """Serve until the event loop ends."""
        self._server = await asyncio.start_server(self._serve, sock=self._socket, limit=_MAX_HEAD)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._socket.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_LIMIT):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(head, *self._answer(head)))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client's fault
        finally:
            writer.close()

    def _answer(self, head: bytes) -> Answer:
        method, _, rest = head.partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", _TEXT, b"only GET is supported\n"
        match rest.partition(b" ")[0].partition(b"?")[0]:
            case b"/healthz":
                return "200 OK", _TEXT, b"ok\n"
            case b"/readyz" if self.ready:
                return "200 OK", _TEXT, b"ready\n"
            case b"/readyz":
                return "503 Service Unavailable", _TEXT, b"not ready\n"
            case b"/metrics":
                self._refresh()
                return "200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry)
        return "404 Not Found", _TEXT, b"try /healthz, /readyz or /metrics\n"


def _response(head: bytes, status: str, content_type: str, body: bytes) -> bytes:
    header = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return header.encode() + (b"" if head.startswith(b"HEAD ") else body)
