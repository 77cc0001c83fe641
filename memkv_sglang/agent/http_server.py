"""`/livez`, `/readyz` and `/metrics` over HTTP, for probes and scrapes."""

import asyncio
import hmac
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST

from memkv_sglang.config.certificates import FileWatch, load_certificate
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import read_private
from memkv_sglang.config.schema import AgentConfig

log = logging.getLogger(__name__)

REQUEST_LIMIT = 5.0
"""Seconds for a client to send its request and receive the response."""

MAX_CONNECTIONS = 64
"""Maximum open connections; further ones are closed."""

RELOAD_PERIOD = 1.0
"""Seconds between checks for a changed certificate or token."""

_MAX_HEAD = 16 << 10

Answer = tuple[str, str, bytes]
"""An HTTP response: its status, additional header lines, and body."""

_TEXT = "Content-Type: text/plain; charset=utf-8\r\n"


class HttpServer:
    """Serves GET requests in the event loop, one per connection."""

    def __init__(self, config: AgentConfig, metrics: Callable[[], bytes]) -> None:
        """Bind the address, and read certificate and token. Raises `ConfigError`.

        `metrics` returns the body of `/metrics`.
        """
        self.ready = False
        """The status that `/readyz` reports."""
        self._metrics = metrics
        self._connections = 0
        self._config = config
        self._context = make_context(config)
        self._token = read_token(config)
        self._watch = FileWatch(
            [config.http_cert_file, config.http_key_file, config.http_token_file]
        )
        self._socket = _bind(config.http_address, config.http_port)
        self.port: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        """URL of the metrics."""
        host = self._config.http_address
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self._context else 'http'}://{host}:{self.port}/metrics"

    async def start(self) -> None:
        """Serve until the event loop ends."""
        self._server = await asyncio.start_server(
            self._serve,
            sock=self._socket,
            limit=_MAX_HEAD,
            ssl=self._context,
            ssl_handshake_timeout=REQUEST_LIMIT if self._context else None,
        )
        self._reloading = asyncio.create_task(self._reload_changes())

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._socket.close()

    async def _reload_changes(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_PERIOD)
            if self._watch.changed():
                self._reload()

    def _reload(self) -> None:
        """Use changed files for new connections. If they are invalid, keep the earlier content."""
        try:
            # Try the files on a new context first, because a failure leaves a context unusable.
            make_context(self._config)
            self._token = read_token(self._config)
            if self._context:
                _load(self._context, self._config)
        except ConfigError as error:
            fields = {"reason": str(error)}
            log.warning("cannot use the changed certificate or token", extra={"fields": fields})
        else:
            log.info("certificate and token of the HTTP server reloaded")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MAX_CONNECTIONS:
                async with asyncio.timeout(REQUEST_LIMIT):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(_response(head, *self._answer(head)))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client's fault
        finally:
            self._connections -= 1
            writer.close()

    def _answer(self, head: bytes) -> Answer:
        method, _, rest = head.partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", _TEXT, b"only GET is supported\n"
        match rest.partition(b" ")[0].partition(b"?")[0]:
            case b"/livez" | b"/healthz":
                return "200 OK", _TEXT, b"ok\n"
            case b"/readyz" if self.ready:
                return "200 OK", _TEXT, b"ready\n"
            case b"/readyz":
                return "503 Service Unavailable", _TEXT, b"not ready\n"
            case b"/metrics" if self._is_authorized(head):
                return "200 OK", f"Content-Type: {CONTENT_TYPE_LATEST}\r\n", self._metrics()
            case b"/metrics":
                fields = f"{_TEXT}WWW-Authenticate: Bearer\r\n"
                return "401 Unauthorized", fields, b"send the token of agent.http_token_file\n"
        return "404 Not Found", _TEXT, b"try /livez, /readyz or /metrics\n"

    def _is_authorized(self, head: bytes) -> bool:
        if not self._token:
            return True
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"authorization":
                scheme, _, token = value.strip().partition(b" ")
                is_bearer = scheme.lower() == b"bearer"
                return is_bearer and hmac.compare_digest(token.strip(), self._token)
        return False


def _bind(address: str, port: int) -> socket.socket:
    is_v6 = ipaddress.ip_address(address).version == 6
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"agent.http_address, agent.http_port: cannot listen on {address}:{port} "
            f"({error.strerror}); set another port, or 0 to use a free one"
        ) from None


def make_context(config: AgentConfig) -> ssl.SSLContext | None:
    """Return the server's TLS context, None for plain http. Raises `ConfigError`."""
    if not config.http_cert_file:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, config)
    return context


def _load(context: ssl.SSLContext, config: AgentConfig) -> None:
    load_certificate(context, "agent.http_", config.http_cert_file, config.http_key_file)


def read_token(config: AgentConfig) -> bytes:
    """Return the token that scrapes must send; empty if they need none. Raises `ConfigError`."""
    if not config.http_token_file:
        return b""
    name = "agent.http_token_file"
    token = read_private(config.http_token_file, name).strip()
    if not token or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(
            f"{name}: {config.http_token_file} does not contain one token; write it with "
            f"`openssl rand -hex 32`"
        )
    return token


def _response(head: bytes, status: str, fields: str, body: bytes) -> bytes:
    header = (
        f"HTTP/1.1 {status}\r\n{fields}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return header.encode() + (b"" if head.startswith(b"HEAD ") else body)
