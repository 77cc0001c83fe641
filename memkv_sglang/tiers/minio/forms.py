"""Convert between a page's bytes and the content of its object, which is unchanged or encrypted."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from typing_extensions import override

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.page import Page
from memkv_sglang.tiers.minio.http import ResponseHead, Sealing, UnreadableError

if TYPE_CHECKING:
    from memkv_sglang.encryption.keys import KeyRing

KEY_ID = "x-amz-meta-memkv-key"
"""Metadata field of an encrypted page with the id of its key."""


_KEPT_MEMORY = 128 << 20
"""Maximum bytes of the buffers kept for reuse."""

_CALL_MEMORY = 16 << 20
"""Maximum size of the sealed pages that one call has in flight, in bytes, if that is a page."""


class PageForm(ABC):
    """The form in which this node stores pages. Thread-safe."""

    fields: Mapping[str, str]
    """Header fields that mark the form of a stored page."""

    sealing: Sealing | None = None
    """How stored pages are encrypted; None if the stored bytes are the page's own bytes."""

    overhead = 0
    """Bytes that a stored page has in addition to the page's own."""

    def scratch(self, length: int, count: int) -> AbstractContextManager[list[bytearray]]:
        """Lend memory for sealed pages of `length` bytes each, for a `with` block.

        Lends at most `count` pieces, and none if pages are not sealed.
        """
        return nullcontext([])

    @abstractmethod
    def stored_page(self, page: Page) -> AbstractContextManager[Page]:
        """Lend a page with memory for the stored form, for a `with` block. May be `page` itself."""

    @abstractmethod
    def store(self, page: Page, stored: Page) -> None:
        """Fill `stored`, which `stored_page` has lent. Raises `ChangedPageError`."""

    @abstractmethod
    def check(self, head: ResponseHead) -> str | None:
        """Return why a stored object cannot be a page of this form; None if it can.

        Raises `UnreadableError` if the object may be intact, but this node cannot read it.
        """

    @abstractmethod
    def restore(
        self, head: ResponseHead, stored: Page, page: Page, checksum: bytes
    ) -> bytes | None:
        """Fill the page's buffers from `stored`, whose checksum is given.

        Returns the checksum of the page's content; None if `stored` is forged.
        """


class PlainForm(PageForm):
    """Stores the page's bytes unchanged."""

    fields: Mapping[str, str] = {}

    @override
    def stored_page(self, page: Page) -> AbstractContextManager[Page]:
        return nullcontext(page)

    @override
    def store(self, page: Page, stored: Page) -> None:
        pass  # `stored` is the page itself

    @override
    def check(self, head: ResponseHead) -> str | None:
        if key_id := _key_id(head):
            raise UnreadableError(f"pages are encrypted by {key_id!r}, {_ADVICE}")
        return None

    @override
    def restore(
        self, head: ResponseHead, stored: Page, page: Page, checksum: bytes
    ) -> bytes | None:
        return checksum


class SealedForm(PageForm):
    """Stores pages encrypted and authenticated. See `memkv_sglang.encryption`."""

    def __init__(self, ring: "KeyRing") -> None:
        """Encrypt with the ring's keys. Raises `ConfigError` if `cryptography` is not installed."""
        try:
            from memkv_sglang.encryption import sealing
        except ImportError:
            raise ConfigError(
                "minio.encryption_key_file: the package cryptography is not installed; install "
                "sglang-memkv[encryption]"
            ) from None
        self._sealing = sealing
        self.overhead = sealing.OVERHEAD
        self._ring = ring
        self._idle: list[bytearray] = []
        self.fields = {KEY_ID: ring.write}
        self.sealing = Sealing(
            {f"\r\n{KEY_ID}: {name}\r\n".encode(): key for name, key in ring.keys.items()},
            sealing.CONTEXT,
            ring.keys[ring.write],
        )

    @override
    @contextmanager
    def scratch(self, length: int, count: int) -> Iterator[list[bytearray]]:
        size = length + self._sealing.OVERHEAD
        count = max(min(count, _CALL_MEMORY // size), 1)
        pieces = [self._take(size) for _ in range(count)]
        try:
            yield pieces
        finally:
            for piece in pieces:
                self._keep(piece)

    @contextmanager
    def stored_page(self, page: Page) -> Iterator[Page]:
        """Lend a reused buffer, because allocating one costs as much as encrypting a page."""
        size = page.length + self._sealing.OVERHEAD
        memory = self._take(size)
        yield Page(page.key, (memoryview(memory)[:size],))
        self._keep(memory)

    def _take(self, size: int) -> bytearray:
        memory = self._idle.pop() if self._idle else bytearray()
        return memory if len(memory) >= size else bytearray(size)

    def _keep(self, memory: bytearray) -> None:
        if sum(map(len, self._idle)) + len(memory) <= _KEPT_MEMORY:
            self._idle.append(memory)

    def store(self, page: Page, stored: Page) -> None:
        """Encrypt with the current key."""
        self._sealing.seal(self._ring.keys[self._ring.write], page, stored.buffers[0])

    def check(self, head: ResponseHead) -> str | None:
        """Reject unencrypted objects, which anyone with write access could have stored."""
        key_id = _key_id(head)
        if not key_id:
            return "not encrypted"
        if key_id not in self._ring.keys:
            raise UnreadableError(f"pages are encrypted by {key_id!r}, {_ADVICE}")
        return None

    def restore(
        self, head: ResponseHead, stored: Page, page: Page, checksum: bytes
    ) -> bytes | None:
        """Decrypt with the key that the metadata name; return the checksum from inside."""
        try:
            return self._sealing.unseal(self._ring.keys[_key_id(head)], stored.buffers[0], page)
        except self._sealing.ForgedError:
            return None


_ADVICE = "which minio.encryption_key_file does not hold"


def page_form(key_file: str) -> PageForm:
    """Return the form for the setting `minio.encryption_key_file`. Raises `ConfigError`."""
    if not key_file:
        return PlainForm()
    from memkv_sglang.encryption.keys import load_key_ring

    return SealedForm(load_key_ring(key_file))


def _key_id(head: ResponseHead) -> str:
    return (head.field(KEY_ID.encode()) or b"").decode(errors="replace")
