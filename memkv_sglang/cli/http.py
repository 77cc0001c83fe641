"""HTTP requests to SGLang servers and to the agent's metrics port.

The proxies of `http_proxy`, `https_proxy` and `no_proxy` are used as elsewhere, but never for this
machine's own addresses.
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
"""Bytes of an answer: the token ids of the longest prompts are a few million characters."""

_PIECE = 64 << 10


def fetch(url: str, seconds: float, body: bytes | None = None, advice: str = "") -> bytes:
    """Return what a server answers to a GET, or to a POST of a JSON `body`.

    Raises `click.ClickException` if there is no complete answer in time.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - callers check the URL
    deadline = time.monotonic() + seconds
    proxies = _Proxies()
    try:
        with urllib.request.build_opener(proxies).open(request, timeout=seconds) as response:
            return _read(response, deadline)
    except (OSError, http.client.HTTPException, ValueError) as error:
        hint = f"; the proxy {proxies.used} was asked, see no_proxy" if proxies.used else ""
        raise click.ClickException(
            f"no answer from {url} ({_reason(error)}{hint}){advice}"
        ) from None


def check_server_url(url: str, option: str) -> str:
    """Return the URL without a final slash; raises `click.UsageError` for one of no server."""
    parts = split_url(url)
    usable = parts is not None and url.isascii() and "@" not in parts.netloc
    if not usable or parts is None or parts.scheme not in ("http", "https"):
        raise click.UsageError(f"{option}: {url[:60]!r} is no http URL; write http://HOST:PORT")
    if parts.query or parts.fragment:
        raise click.UsageError(f"{option}: {url[:60]!r} has a query; remove it")
    return url.rstrip("/")


def is_this_machine(host: str) -> bool:
    """Tell whether a host is certainly this machine, or only meant for it, without asking DNS."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    try:
        # inet_aton also reads what the resolver takes for an address: 127.1, 0x7f000001.
        text = name if ":" in name else socket.inet_ntoa(socket.inet_aton(name))
        address: Any = ipaddress.ip_address(text)
    except (OSError, ValueError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return bool(address.is_loopback or address.is_link_local or address.is_unspecified)


class _Proxies(urllib.request.ProxyHandler):
    """The environment's proxies, left out for this machine; decides anew for each redirect."""

    used = ""
    """Host of the proxy that was asked."""

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
            raise ValueError(f"it has more than {ANSWER_LIMIT >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError("it takes too long")
    if response.length:
        raise ValueError("it ends early")
    return bytes(answer)


def _reason(error: Exception) -> str:
    reason = str(error.reason if isinstance(error, URLError) else error) or type(error).__name__
    return f"HTTP {error.code} {reason}" if isinstance(error, HTTPError) else reason
