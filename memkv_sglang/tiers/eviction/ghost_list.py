"""Remember recently evicted pages in little memory."""

from array import array

_TAG = 0xFFFF_FF00
_WAYS = 8
"""Pages per bucket. A full bucket forgets its oldest page."""


class GhostList:
    """Remembers how often recently evicted pages were used, in 4 bytes each. Not thread-safe.

    A hash table of buckets: a page's fingerprint selects its bucket, which stores 24 bits of the
    fingerprint and the number of uses. With a probability of 2^-21, a lookup finds the wrong page;
    the only effect is that this page is credited with uses of another one.
    """

    def __init__(self, pages: int) -> None:
        """Remember about `pages` pages."""
        self._buckets = max(1, pages // _WAYS)
        self._words = array("I", bytes(4 * _WAYS * self._buckets))

    def __len__(self) -> int:
        """Return how many pages the list can hold."""
        return len(self._words)

    def add(self, fingerprint: int, uses: int) -> None:
        """Remember an evicted page and its number of uses."""
        first, tag = self._find(fingerprint)
        bucket = self._words[first : first + _WAYS - 1]
        bucket.insert(0, tag | uses)
        self._words[first : first + _WAYS] = bucket

    def pop(self, fingerprint: int) -> int | None:
        """Forget a page; return its number of uses, or None if the page was not remembered."""
        first, tag = self._find(fingerprint)
        for i in range(first, first + _WAYS):
            word = self._words[i]
            if word & _TAG == tag:
                self._words[i] = 0
                return word & 0xFF
        return None

    def _find(self, fingerprint: int) -> tuple[int, int]:
        """Return the start of the page's bucket, and the page's tag, which is never 0."""
        rest, bucket = divmod(fingerprint, self._buckets)
        return bucket * _WAYS, (rest << 8 & _TAG) or _TAG
