"""Requests and responses of the fast path."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from typing_extensions import override

from memkv_sglang.page import Page

FALLBACK_REASONS = (
    "status",
    "framing",
    "length",
    "close",
    "interim",
    "malformed",
    "stale",
    "changed",
)
"""Reasons for which the fast path leaves pages to the slow path; see `ignore_fallback`."""


class Request(NamedTuple):
    """The object of a page, and the page that receives it or is sent."""

    path: bytes
    """Quoted path below the endpoint's `base_path`."""
    page: Page


class BulkTemplate(NamedTuple):
    """The parts of a signed request that do not depend on the object; see `auth.sigv4`.

    In a request that stores an object, the value of one field is the object's checksum, in
    hexadecimal digits.
    """

    start: bytes
    """Method, space and base path."""
    canonical: bytes
    """The canonical request after the path, up to the checksum if there is one."""
    text: bytes
    """The string to sign, up to the hash of the canonical request."""
    key: bytes
    lines: bytes
    """The header fields, up to the checksum if there is one, else up to the signature."""
    canonical_end: bytes = b""
    """The canonical request after the checksum."""
    lines_end: bytes = b""
    """The header fields after the checksum, up to the signature."""


class Metadata(NamedTuple):
    """What the head of a stored page contains, in lower case. Lines begin and end with CR LF."""

    prefix: bytes
    """Beginning of all fields of this project."""
    lines: tuple[bytes, ...]
    """The lines that every page has."""
    length: bytes
    """Beginning of the line that ends with the length."""
    checksum: bytes
    """Beginning of the line that ends with the checksum in hexadecimal digits."""


class Sealing(NamedTuple):
    """How stored pages are encrypted; see `memkv_sglang.encryption.sealing`."""

    keys: Mapping[bytes, bytes]
    """Master keys, by the line of the head that names the key."""
    context: bytes
    """The associated data, up to the page's key."""
    write: bytes = b""
    """The master key for new pages."""

    @override
    def __repr__(self) -> str:
        """Show no key."""
        return "Sealing(...)"


class Response(NamedTuple):
    """A completely received object of the page's length. Its metadata are not verified yet."""

    number: int
    """Index of the request it answers."""
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
    - `malformed`: not a valid HTTP response, or a 200 before the page was sent or without an ETag;
    - `stale`: an idle connection was dead when it was reused;
    - `changed`: the content of a page to send does not match its checksum.
    """
