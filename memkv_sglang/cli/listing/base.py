"""The interface of listings."""

from typing import NamedTuple, Protocol

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PageKey


class StoredPage(NamedTuple):
    """A page stored in a tier."""

    key: PageKey
    length: int
    """Size of the content in bytes."""
    place: str
    """Human-readable location."""


class Listing(Protocol):
    """The pages of one tier. Calls block and raise `TierError`."""

    @property
    def name(self) -> str:
        """The tier's name."""

    def namespaces(self) -> dict[bytes, Namespace | None]:
        """Return the namespaces by digest, None for one without a description."""

    def pages(self, namespace: bytes) -> list[StoredPage]:
        """Return every page of a namespace, in any order."""

    def find(self, key: PageKey) -> StoredPage | None:
        """Return a page, or None if it is not stored."""
