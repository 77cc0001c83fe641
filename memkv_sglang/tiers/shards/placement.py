"""Decide which shards a page belongs to."""

import hashlib
from collections.abc import Sequence

from memkv_sglang.page import PageKey

MASK = (1 << 64) - 1


class Placement:
    """Ranks shards for a page by rendezvous hashing.

    A shard's score for a page depends only on the page's key and the shard's name, so adding or
    removing a shard moves only that shard's share of the pages. If a page's first shard is removed,
    the other shards keep their order.

    The key includes the namespace. The ranks of a tensor-parallel group load pages with the same
    hashes at the same time. With placement by hash alone, the shard with most of one rank's pages
    would have most of every rank's, and the others would idle.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Rank the shards with these names, which must differ. Their order makes no difference."""
        self._factors = [_factors(name) for name in names]
        self._numbers = range(len(names))

    def first(self, key: PageKey) -> int:
        """Return the number of the page's first shard; faster than `order`."""
        number = _number(key)
        # The usual number of shards. This computes the same as below in half of the time.
        if len(self._factors) == 2:
            (factor, addend), (other_factor, other_addend) = self._factors
            return int(
                (number * factor + addend) & MASK < (number * other_factor + other_addend) & MASK
            )
        scores = [(number * factor + addend) & MASK for factor, addend in self._factors]
        return scores.index(max(scores))

    def order(self, key: PageKey) -> Sequence[int]:
        """Return the numbers of all shards, beginning with the page's first shard."""
        if len(self._factors) == 2:
            first = self.first(key)
            return (first, 1 - first)
        number = _number(key)
        scores = [(number * factor + addend) & MASK for factor, addend in self._factors]
        return sorted(self._numbers, key=scores.__getitem__, reverse=True)


def _number(key: PageKey) -> int:
    # Both are cryptographic hashes, so one multiplication and one addition mix them well enough.
    return int.from_bytes(key.hash[:8], "little") ^ int.from_bytes(key.namespace[:8], "little")


def _factors(name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little") | 1, int.from_bytes(digest[8:], "little")
