"""Requests and responses of the fast path."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from memkv_sglang.page import Page

FALLBACK_REASONS = ("status", "framing", "length", "close", "interim", "malformed", "stale")
"""Why the fast path leaves pages to the slow path, see `ignore_fallback`."""


class Request(NamedTuple):
    """The object of a page, and the page to receive it into."""

    path: bytes
    """Path below the endpoint's `base_path`, quoted."""
    page: Page


class BulkTemplate(NamedTuple):
    """Everything in a signed request that does not depend on the object; see `auth.sigv4`."""

    start: bytes
    """Method, space and base path."""
    canonical: bytes
    """The canonical request after the path."""
    text: bytes
    """The string to sign, up to the hash of the canonical request."""
    key: bytes
    lines: bytes
    """The header fields, up to the signature."""


class Metadata(NamedTuple):
    """What the head of a stored page contains, in lower case. Lines begin and end with CR LF."""

    prefix: bytes
    """Start of all own fields."""
    lines: tuple[bytes, ...]
    """Lines that every page has."""
    length: bytes
    """Start of the line that ends with the length."""
    checksum: bytes
    """Start of the line that ends with the checksum in hexadecimal digits."""


class Sealing(NamedTuple):
    """How stored pages are encrypted; see `memkv_sglang.encryption.sealing`."""

    keys: Mapping[bytes, bytes]
    """Master keys, by the line of the head that names the key."""
    context: bytes
    """The associated data before the page's key."""


class Response(NamedTuple):
    """An object of the page's length, received completely. Its metadata is not verified yet."""

    number: int
    """Index of the request."""
    head: bytes
    """The response head as received, up to the empty line."""
    checksum: bytes
    """Checksum of the object's bytes."""


FallBack = Callable[[str], None]


def ignore_fallback(_: str) -> None:
    """Do nothing. A replacement is called with the reason for each page left to the slow path.

    - `status`: the server did not answer 200 (a missing page, for example);
    - `framing`: chunked, or without a content length;
    - `length`: another content length than the page's;
    - `close`: the server closes the connection, or closed it mid-response;
    - `interim`: a 1xx response came first;
    - `malformed`: not a valid HTTP response;
    - `stale`: an idle connection was dead when it was reused.
    """
