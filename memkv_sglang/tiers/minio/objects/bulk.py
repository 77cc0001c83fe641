"""What is asked for at once, and what comes back."""

from collections.abc import Callable
from typing import NamedTuple

from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.http.endpoints import Endpoint


class Request(NamedTuple):
    """What to send for a page's object, and where its bytes are to go."""

    number: int
    """Tells the caller's pages apart."""
    page: Page
    head: bytes


class Response(NamedTuple):
    """An object of the right length, received to its last byte. All else is still to be judged."""

    number: int
    head: bytes
    """As the server wrote it, up to the empty line."""
    checksum: bytes
    """Of what is in the page's buffers now."""


class Source(NamedTuple):
    """Where requests come from, and responses go. Must be safe for several threads."""

    take: Callable[[Endpoint], Request | None]
    """Returns the next request for a server, None if there are no more."""
    stop: Callable[[], None]
    """Called when something is not as it should be: no more requests then."""
    deliver: Callable[[Response], None]
