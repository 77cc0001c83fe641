"""What is remembered of pages that left."""

from array import array

_TAG = 0xFFFF_FF00
_WAYS = 8
"""Pages that share a bucket; the one that left it first is forgotten for a new one."""


class GhostList:
    """How often pages were used that left lately, 4 bytes each. Not thread-safe.

    A table of buckets: a page's fingerprint names its bucket, and 24 bits of it are kept there
    beside the number of uses. Pages are confused with a chance of 2^-21 for each look, which then
    counts a use too many.
    """

    def __init__(self, pages: int) -> None:
        """Remember about `pages` pages."""
        self._buckets = max(1, pages // _WAYS)
        self._words = array("I", bytes(4 * _WAYS * self._buckets))

    def __len__(self) -> int:
        """Return how many pages there is room for."""
        return len(self._words)

    def add(self, fingerprint: int, uses: int) -> None:
        """Remember a page that leaves."""
        first, tag = self._find(fingerprint)
        bucket = self._words[first : first + _WAYS - 1]
        bucket.insert(0, tag | uses)
        self._words[first : first + _WAYS] = bucket

    def take(self, fingerprint: int) -> int | None:
        """Forget a page that is back; return its uses, None if it was not remembered."""
        first, tag = self._find(fingerprint)
        for i in range(first, first + _WAYS):
            word = self._words[i]
            if word & _TAG == tag:
                self._words[i] = 0
                return word & 0xFF
        return None

    def _find(self, fingerprint: int) -> tuple[int, int]:
        """Return where the bucket begins, and the tag, which is never 0."""
        rest, bucket = divmod(fingerprint, self._buckets)
        return bucket * _WAYS, (rest << 8 & _TAG) or _TAG
