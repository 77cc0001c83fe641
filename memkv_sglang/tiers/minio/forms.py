"""How a page's bytes become an object's content and back: as they are, or encrypted."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.http import ResponseHead, UnreadableError

if TYPE_CHECKING:
    from memkv_sglang.encryption.keys import KeyRing

KEY_ID = "x-amz-meta-memkv-key"
"""Metadata of an encrypted page: the id of its key."""


_KEPT = 64 << 20
"""Bytes of memory for encrypted pages that are kept for the next ones."""


class PageForm(ABC):
    """The form that this node stores pages in, and takes them from. Thread-safe."""

    fields: Mapping[str, str]
    """Header fields that say so when a page is stored."""

    in_place = False
    """Whether the stored form is the page's own bytes."""

    @abstractmethod
    def stored_page(self, page: Page) -> AbstractContextManager[Page]:
        """Lend the page over memory for its stored form, which may be the page itself."""

    @abstractmethod
    def store(self, page: Page, stored: Page) -> None:
        """Fill `stored`, a result of `stored_page`. Raises `ChangedPageError`."""

    @abstractmethod
    def check(self, head: ResponseHead) -> str | None:
        """Tell in which way a stored object cannot be a page of this form.

        Raises `UnreadableError` for one that may well be right, but not for this node to read.
        """

    @abstractmethod
    def restore(
        self, head: ResponseHead, stored: Page, page: Page, checksum: bytes
    ) -> bytes | None:
        """Fill the page's buffers from `stored`, which has the given checksum.

        Returns the checksum of the page's content, None if `stored` is forged.
        """


class PlainForm(PageForm):
    """The page's bytes as they are."""

    fields: Mapping[str, str] = {}
    in_place = True

    def stored_page(self, page: Page) -> AbstractContextManager[Page]:
        """Lend the page itself."""
        return nullcontext(page)

    def store(self, page: Page, stored: Page) -> None:
        """There is nothing to do."""

    def check(self, head: ResponseHead) -> str | None:
        """Take what no key is named for."""
        if key_id := _key_id(head):
            raise UnreadableError(f"pages are encrypted by {key_id!r}, {_ADVICE}")
        return None

    def restore(
        self, head: ResponseHead, stored: Page, page: Page, checksum: bytes
    ) -> bytes | None:
        """Return the checksum: the stored bytes are the page's own."""
        return checksum


class SealedForm(PageForm):
    """Encrypted and authenticated, in memory of its own. See `memkv_sglang.encryption`."""

    def __init__(self, ring: "KeyRing") -> None:
        """Import `cryptography`; raise `ConfigError` where it is not installed."""
        try:
            from memkv_sglang.encryption import sealing
        except ImportError:
            raise ConfigError(
                "minio.encryption_key_file: the package cryptography is not installed; install "
                "sglang-memkv[encryption]"
            ) from None
        self._sealing = sealing
        self._ring = ring
        self._idle: list[bytearray] = []
        self.fields = {KEY_ID: ring.write}

    @contextmanager
    def stored_page(self, page: Page) -> Iterator[Page]:
        """Lend memory that is used again: fresh memory costs as much as the encryption."""
        size = page.length + self._sealing.OVERHEAD
        memory = self._idle.pop() if self._idle else bytearray()
        if len(memory) < size:
            memory = bytearray(size)
        yield Page(page.key, (memoryview(memory)[:size],))
        if sum(map(len, self._idle)) + len(memory) <= _KEPT:
            self._idle.append(memory)

    def store(self, page: Page, stored: Page) -> None:
        """Encrypt with the key that writes."""
        self._sealing.seal(self._ring.keys[self._ring.write], page, stored.buffers[0])

    def check(self, head: ResponseHead) -> str | None:
        """Refuse what is not encrypted: anyone who can write the bucket could have put it there."""
        key_id = _key_id(head)
        if not key_id:
            return "not encrypted"
        if key_id not in self._ring.keys:
            raise UnreadableError(f"pages are encrypted by {key_id!r}, {_ADVICE}")
        return None

    def restore(
        self, head: ResponseHead, stored: Page, page: Page, checksum: bytes
    ) -> bytes | None:
        """Decrypt with the key that is named; return the checksum sealed with the content."""
        try:
            return self._sealing.unseal(self._ring.keys[_key_id(head)], stored.buffers[0], page)
        except self._sealing.ForgedError:
            return None


_ADVICE = "which minio.encryption_key_file does not hold"


def page_form(key_file: str) -> PageForm:
    """Return the form for the setting `minio.encryption_key_file`; raises `ConfigError`."""
    if not key_file:
        return PlainForm()
    from memkv_sglang.encryption.keys import load_key_ring

    return SealedForm(load_key_ring(key_file))


def _key_id(head: ResponseHead) -> str:
    return (head.field(KEY_ID.encode()) or b"").decode(errors="replace")
