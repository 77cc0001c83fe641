"""A bounded set of recently added pages."""

from collections import OrderedDict
from collections.abc import Iterable

from memkv_sglang.page import PageKey


class RecentPages:
    """A set of the `size` pages that were added last, at about 150 bytes each. Not thread-safe.

    Stores 24 bytes of each key, which makes collisions negligible.
    """

    def __init__(self, size: int) -> None:
        """Start empty."""
        self._size = size
        self._pages: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: PageKey) -> bool:
        return _short(key) in self._pages

    def add(self, keys: Iterable[PageKey]) -> None:
        """Add pages. If there are more than `size`, drop the oldest ones."""
        for key in keys:
            self._pages[_short(key)] = None
        while len(self._pages) > self._size:
            self._pages.popitem(last=False)

    def discard(self, namespace: bytes) -> None:
        """Remove all pages of a namespace."""
        self._pages = OrderedDict.fromkeys(k for k in self._pages if k[:8] != namespace[:8])

    def remove(self, key: PageKey) -> bool:
        """Remove a page; return whether it was in the set."""
        return self._pages.pop(_short(key), self) is None


def _short(key: PageKey) -> bytes:
    return key.namespace[:8] + key.hash[:16]
