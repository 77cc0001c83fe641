"""What both listings can tell."""

from typing import NamedTuple, Protocol

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import PageKey


class StoredPage(NamedTuple):
    """A page that a tier holds."""

    key: PageKey
    length: int
    """Bytes of content."""
    place: str
    """Where it lies, for people."""


class Listing(Protocol):
    """The pages of one tier. Calls block and raise `TierError`."""

    @property
    def name(self) -> str:
        """The tier's name."""

    def namespaces(self) -> dict[bytes, Namespace | None]:
        """Return the namespaces by digest, with None for a description that is missing."""

    def pages(self, namespace: bytes) -> list[StoredPage]:
        """Return every page of a namespace, in no order."""

    def find(self, key: PageKey) -> StoredPage | None:
        """Return a page, None if it is not there."""
