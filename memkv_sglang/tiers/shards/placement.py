"""Decide which shards a page belongs to."""

import hashlib
from collections.abc import Sequence

MASK = (1 << 64) - 1


class Placement:
    """Ranks shards for a page by rendezvous hashing.

    A shard's score for a page depends only on the page's hash and the shard's name, so adding or
    removing a shard moves only that shard's share of the pages. If a page's first shard is removed,
    the other shards keep their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Rank the shards with these names, which must differ. Their order makes no difference."""
        self._factors = [_factors(name) for name in names]
        self._numbers = range(len(names))

    def first(self, page_hash: bytes) -> int:
        """Return the number of the page's first shard; faster than `order`."""
        # Page hashes are SHA-256, so one multiplication and one addition mix them well enough.
        number = int.from_bytes(page_hash[:8], "little")
        # The usual number of shards. This computes the same as below in half of the time.
        if len(self._factors) == 2:
            (factor, addend), (other_factor, other_addend) = self._factors
            return int(
                (number * factor + addend) & MASK < (number * other_factor + other_addend) & MASK
            )
        scores = [(number * factor + addend) & MASK for factor, addend in self._factors]
        return scores.index(max(scores))

    def order(self, page_hash: bytes) -> Sequence[int]:
        """Return the numbers of all shards, beginning with the page's first shard."""
        if len(self._factors) == 2:
            first = self.first(page_hash)
            return (first, 1 - first)
        number = int.from_bytes(page_hash[:8], "little")
        scores = [(number * factor + addend) & MASK for factor, addend in self._factors]
        return sorted(self._numbers, key=scores.__getitem__, reverse=True)


def _factors(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") | 1, int.from_bytes(digest[8:], "little")
