"""Requests and responses of the fast path."""

from collections.abc import Callable
from typing import NamedTuple

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.http.endpoints import Endpoint

FALLBACK_REASONS = ("status", "framing", "length", "close", "interim", "malformed", "stale")
"""Why the fast path leaves pages to the slow path, see `Source.fall_back`."""


class Request(NamedTuple):
    """A request for a page's object, and the page to receive it into."""

    number: int
    """Identifies the page to the caller."""
    page: Page
    head: bytes


class Response(NamedTuple):
    """An object of the page's length, received completely. Its metadata is not verified yet."""

    number: int
    head: bytes
    """The response head as received, up to the empty line."""
    checksum: bytes
    """Checksum of the page's buffers."""


def _ignore(_: str) -> None:
    pass


class Source(NamedTuple):
    """Supplies requests and takes responses. Its functions must be thread-safe."""

    take: Callable[[Endpoint], Request | None]
    """Returns the next request for a server, None if there are no more."""
    stop: Callable[[], None]
    """Called after the first response that the fast path cannot handle; ends the requests."""
    deliver: Callable[[Response], None]
    fall_back: Callable[[str], None] = _ignore
    """Called with one of `FALLBACK_REASONS` for each request left to the slow path:

    - `status`: the server did not answer 200 (a missing page, for example);
    - `framing`: chunked, or without a content length;
    - `length`: another content length than the page's;
    - `close`: the server closes the connection, or closed it mid-response;
    - `interim`: a 1xx response came first;
    - `malformed`: not a valid HTTP response;
    - `stale`: an idle connection was dead when it was reused.
    """
