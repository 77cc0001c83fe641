"""Find out which shards hold pages, with few requests."""

import time
from collections.abc import Iterable, Sequence
from functools import partial

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.search import best_width, longest_prefix
from memkv_sglang.tiers.shards.router import Router
from memkv_sglang.tiers.shards.shard import Shard, ShardCalls


class ShardSearch:
    """A search within one call of the tier."""

    def __init__(
        self, shards: Sequence[Shard], router: Router, calls: ShardCalls, deadline: float
    ) -> None:
        """Search the shards that work now. Raises `TierError` if none does."""
        self._shards = shards
        self._router = router
        self._calls = calls
        self._deadline = deadline
        self._live = router.live()
        self.lost: set[int] = set()
        """Shards that failed in this call."""
        self.asked = 0
        """Number of pages that shards were asked about. Each cost at most one request."""
        if not self._live:
            raise TierError("no shard works")

    @property
    def is_degraded(self) -> bool:
        """Whether a shard does not work."""
        return len(self._live) < len(self._shards) or bool(self.lost)

    def prefix(self, chain: Chain, low: int, high: int) -> tuple[int, int]:
        """Return bounds of the number of leading pages that are present.

        The bounds are equal unless time ran out. The whole chain is searched first, each page in
        its own shard. Such a search can miss the gaps that a shard leaves if it lost its share of
        the chain. So the last page of each share is checked then, and the shares that lack it are
        searched.
        """
        begin = low
        low, high = self._longest(chain, range(begin, high), high)
        if low < high:
            return low, high
        lasts = self._last_of_shares(chain, begin, low)
        places = self.places(_keys(chain, lasts), thorough=True)
        incomplete = {
            self._router.home(PageKey(chain.namespace, chain.hashes[i]))
            for i, place in zip(lasts, places, strict=True)
            if place is None
        }
        for home in incomplete:
            keys = enumerate(_keys(chain, range(begin, low)), begin)
            share = [i for i, key in keys if self._router.home(key) == home]
            bounds = self._longest(chain, share, low)
            low, high = min(low, bounds[0]), min(high, bounds[1])
        return low, high

    def _longest(self, chain: Chain, positions: Sequence[int], limit: int) -> tuple[int, int]:
        """Search some positions of the chain; return bounds of the first missing one.

        It is `limit` if none is missing.
        """

        def probe(numbers: Sequence[int]) -> list[bool] | None:
            keys = _keys(chain, [positions[i] for i in numbers])
            places = self.places(keys, thorough=False)
            if time.monotonic() >= self._deadline:
                return None
            return [place is not None for place in places]

        end = len(positions)
        round_trip = max(self._shards[number].round_trip() for number in self._live)
        found = longest_prefix(0, end, probe, best_width(end, round_trip))
        low, high = (positions[i] if i < end else limit for i in found)
        return low, high

    def _last_of_shares(self, chain: Chain, begin: int, end: int) -> list[int]:
        """Return the last position before `end` in each shard's share, in order."""
        lasts: dict[int, int] = {}
        for position in range(end - 1, begin - 1, -1):
            key = PageKey(chain.namespace, chain.hashes[position])
            lasts.setdefault(self._router.home(key), position)
            if len(lasts) == len(self._shards):
                break
        return sorted(lasts.values())

    def places(self, keys: Sequence[PageKey], *, thorough: bool) -> list[int | None]:
        """Return for each page a shard that holds it, or None.

        If a page's first shard lacks it or fails, its next shard is asked. Usually the chain ends
        at the first such page, so unless `thorough`, the others are tried only if its next shard
        has it. Raises `TierError` if every shard fails.
        """
        found: list[int | None] = [None] * len(keys)
        candidates = [self._router.candidates(key, self._live) for key in keys]
        missing = self._ask(range(len(keys)), keys, [c[:1] for c in candidates], found)
        nexts = [c[1:2] for c in candidates]
        if missing and not thorough:
            missing = [] if self._ask(missing[:1], keys, nexts, found) else missing[1:]
        self._ask(missing, keys, nexts, found)
        if self.lost >= set(self._live):
            raise TierError("no shard answers")
        return found

    def elsewhere(self, key: PageKey, tried: int | None) -> int | None:
        """Return a shard other than `tried` that holds the page, or None."""
        others = [number for number in self._router.candidates(key, self._live) if number != tried]
        found: list[int | None] = [None]
        self._ask([0], [key], [others[:1]], found)
        return found[0]

    def _ask(
        self,
        which: Iterable[int],
        keys: Sequence[PageKey],
        targets: Sequence[Sequence[int]],
        found: list[int | None],
    ) -> list[int]:
        """Ask the target of each page, all at once; return which pages are still not found."""
        indices = list(which)
        groups: dict[int, list[int]] = {}
        for index in indices:
            for number in targets[index]:
                if number not in self.lost:
                    groups.setdefault(number, []).append(index)
        if not groups or time.monotonic() >= self._deadline:
            return indices
        self.asked += sum(map(len, groups.values()))
        answers = self._calls.run(
            {
                number: partial(
                    self._shards[number].tier.present, [keys[i] for i in group], self._deadline
                )
                for number, group in groups.items()
            }
        )
        for number, answer in answers.items():
            if isinstance(answer, TierError):
                self.lost.add(number)
                continue
            for index, is_held in zip(groups[number], answer, strict=True):
                if is_held:
                    found[index] = number
                    self._router.note(keys[index], number)
        return [index for index in indices if found[index] is None]


def _keys(chain: Chain, positions: Iterable[int]) -> list[PageKey]:
    return [PageKey(chain.namespace, chain.hashes[i]) for i in positions]
