"""A bounded memory of pages."""

from collections import OrderedDict
from collections.abc import Iterable

from memkv_sglang.page import PageKey


class RecentPages:
    """The last `size` pages that were added, about 150 bytes each. Not thread-safe.

    Pages are told apart by 24 bytes of their key, more than chance will ever confuse.
    """

    def __init__(self, size: int) -> None:
        """Remember nothing yet."""
        self._size = size
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: PageKey) -> bool:
        return _short(key) in self._known

    def add(self, keys: Iterable[PageKey]) -> None:
        """Remember the pages; those that were added first make room."""
        for key in keys:
            self._known[_short(key)] = None
        while len(self._known) > self._size:
            self._known.popitem(last=False)

    def discard(self, namespace: bytes) -> None:
        """Forget all pages of a namespace."""
        self._known = OrderedDict.fromkeys(k for k in self._known if k[:8] != namespace[:8])

    def remove(self, key: PageKey) -> bool:
        """Forget a page; returns whether it was remembered."""
        return self._known.pop(_short(key), self) is None


def _short(key: PageKey) -> bytes:
    return key.namespace[:8] + key.hash[:16]
