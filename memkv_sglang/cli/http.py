"""HTTP requests to SGLang servers and to the agent's metrics port.

`http_proxy`, `https_proxy` and `no_proxy` apply, except to this machine's own addresses.
"""

import http.client
import ipaddress
import socket
import time
import urllib.request
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import click

from memkv_sglang.config.check import split_url

ANSWER_LIMIT = 64 << 20
"""Maximum bytes of a response. The token ids of the longest prompts take a few million bytes."""

_PIECE = 64 << 10


def fetch(url: str, seconds: float, body: bytes | None = None, advice: str = "") -> bytes:
    """Send a GET request, or a POST with a JSON `body`; return the response's body.

    Raises `click.ClickException` if there is no complete response within `seconds`. Its message
    ends with `advice`.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - callers check the URL
    deadline = time.monotonic() + seconds
    proxies = _Proxies()
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=seconds) as response:
            return _read(response, deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        hint = f"; sent through the proxy {proxies.used}, see no_proxy" if proxies.used else ""
        raise click.ClickException(
            f"no answer from {url} ({_reason(error)}{hint}){advice}"
        ) from None


def check_server_url(url: str, option: str) -> str:
    """Return a server's URL without a final slash. Raises `click.UsageError` if it is invalid."""
    parts = split_url(url)
    usable = parts is not None and url.isascii() and "@" not in parts.netloc
    if not usable or parts is None or parts.scheme not in ("http", "https"):
        raise click.UsageError(f"{option}: {url[:60]!r} is not an http URL; use http://HOST:PORT")
    if parts.query or parts.fragment:
        raise click.UsageError(f"{option}: {url[:60]!r} has a query; remove it")
    return url.rstrip("/")


def is_this_machine(host: str) -> bool:
    """Return whether a host is a name or an address of this machine, without asking DNS."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    try:
        # inet_aton accepts the same forms as the resolver, for example 127.1 and 0x7f000001.
        text = name if ":" in name else socket.inet_ntoa(socket.inet_aton(name))
        address: Any = ipaddress.ip_address(text)
    except (OSError, ValueError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return bool(address.is_loopback or address.is_link_local or address.is_unspecified)


class _Proxies(urllib.request.ProxyHandler):
    """Uses the environment's proxies, except for this machine. Checks each redirect again."""

    used = ""
    """Host of the proxy that the request was sent through."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:  # noqa: A002 - urllib's name
        host = req.host
        if is_this_machine(urlsplit(f"//{host}").hostname or ""):
            return None
        answer = super().proxy_open(req, proxy, type)
        if req.host != host:
            self.used = req.host
        return answer


def _read(response: Any, deadline: float) -> bytes:
    answer = bytearray()
    while piece := response.read1(_PIECE):
        answer += piece
        if len(answer) > ANSWER_LIMIT:
            raise ValueError(f"it is larger than {ANSWER_LIMIT >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    if response.length:
        raise ValueError("truncated")
    return bytes(answer)


def _reason(error: Exception) -> str:
    reason = str(error.reason if isinstance(error, URLError) else error) or type(error).__name__
    return f"HTTP {error.code} {reason}" if isinstance(error, HTTPError) else reason
