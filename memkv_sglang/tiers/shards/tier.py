"""The sharded tier: implements the tier contract over complete tiers that each hold a share."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

from typing_extensions import override

from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    Fetched,
    LoadResult,
    Lookup,
    SpillResult,
    Tier,
    TierError,
    TierUsage,
)
from memkv_sglang.tiers.minio.presence_cache import PresenceCache
from memkv_sglang.tiers.shards.placement import Placement
from memkv_sglang.tiers.shards.router import Router
from memkv_sglang.tiers.shards.search import ShardSearch
from memkv_sglang.tiers.shards.shard import Shard, ShardCalls

T = TypeVar("T")

REMOVE_SECONDS = 60.0
"""Maximum seconds to check which of the pages to remove exist."""


def _ignore(_: int) -> None:
    pass


class ShardedTier(Tier):
    """Spreads pages over shards by their hashes, so that no directory of pages is needed.

    A page is stored in the first `replicas` working shards of its ranking, and searched in the
    first two. While a shard is down, its pages are missing until they are stored again in their
    next shard. When the shard works again, all its pages are found.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        *,
        replicas: int = 1,
        presence_cache_pages: int = 0,
        negative_ttl: float = 0.0,
        placement: Placement | None = None,
        report: Callable[[int], None] = _ignore,
    ) -> None:
        """Take ownership of the shards' tiers.

        Args:
            name: the tier's name.
            shards: at least one, with different names.
            replicas: number of shards that store each page, if that many work.
            presence_cache_pages: number of pages to remember as present in some shard.
            negative_ttl: seconds for which a missing page is remembered as missing.
            placement: ranks the shards; by default, by the hash of each page.
            report: called after each lookup with the number of pages that shards were asked about.

        """
        self.name = name
        self._shards = tuple(shards)
        self._replicas = replicas
        placement = placement or Placement([shard.name for shard in shards])
        self._router = Router(self._shards, placement, replicas)
        self._presence = PresenceCache(presence_cache_pages, negative_ttl)
        self._calls = ShardCalls(self._shards)
        self._report = report

    def _search(self, deadline: float) -> ShardSearch:
        return ShardSearch(self._shards, self._router, self._calls, deadline)

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Look in the presence cache, then ask shards about the remaining pages.

        Does not affect the shards' eviction order; see `record_access`.
        """
        search = self._search(deadline)
        low, high = self._presence.bounds(chain)
        if search.is_degraded:
            low = 0  # The shard of a cached page may be down now.
        found, bound = search.prefix(chain, low, high)
        self._presence.add_chain(Chain(chain.namespace, chain.hashes[low:found]))
        if found == bound < high:
            # A page is useless without its ancestors, so all pages after a missing one count as
            # missing.
            absent = [PageKey(chain.namespace, one) for one in chain.hashes[found:]]
            self._presence.discard(*absent)
            if not search.lost:
                self._presence.add_missing(absent[0])
        self._report(search.asked)
        return Lookup(found, complete=found == bound and not search.lost)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Ask each page's shards. A page counts as missing if no answering shard has it."""
        places = self._search(deadline).places(keys, thorough=True)
        if None in places and time.monotonic() >= deadline:
            raise TierError("the deadline passed")
        return [place is not None for place in places]

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load from all shards at once, straight into the pages' buffers."""
        if not pages:
            return []
        outcomes = [Fetched(LoadResult.FAILED)] * len(pages)
        live = self._router.live()
        if not live:
            return outcomes
        places = self._router.places([page.key for page in pages], live)
        self._fetch_from(places, pages, outcomes, deadline)
        first = _first_miss(outcomes)
        if first < len(pages) and time.monotonic() < deadline:
            self._fetch_elsewhere(pages, outcomes, places[first], deadline)
        self._note_fetched(pages, outcomes)
        return outcomes

    def _fetch_from(
        self,
        places: Sequence[int | None],
        pages: Sequence[Page],
        outcomes: list[Fetched],
        deadline: float,
    ) -> None:
        """Load each page from its shard, except those without one; update the outcomes."""
        groups = _groups(places)
        calls = {
            number: partial(self._shards[number].tier.fetch, [pages[i] for i in which], deadline)
            for number, which in groups.items()
        }
        for number, fetched in self._calls.run(calls).items():
            if isinstance(fetched, TierError):
                continue  # `fetch` must not raise
            for index, outcome in zip(groups[number], fetched, strict=True):
                outcomes[index] = outcome

    def _fetch_elsewhere(
        self, pages: Sequence[Page], outcomes: list[Fetched], failed: int, deadline: float
    ) -> None:
        """Search the pages that were not loaded in their other shards, and load them from there.

        The first of them decides: if no other shard has it, the prefix ends there.
        """
        first = _first_miss(outcomes)
        try:
            search = self._search(deadline)
        except TierError:
            return
        if outcomes[first].result is LoadResult.FAILED:
            search.lost.add(failed)
        known = search.elsewhere(pages[first].key, failed)
        if known is None:
            return
        rest = [i for i in range(first, len(pages)) if outcomes[i].result is not LoadResult.LOADED]
        try:
            places = [known, *search.places([pages[i].key for i in rest[1:]], thorough=True)]
        except TierError:
            return
        end = places.index(None) if None in places else len(places)
        again = [Fetched(LoadResult.SKIPPED)] * end
        self._fetch_from(places[:end], [pages[i] for i in rest[:end]], again, deadline)
        for index, outcome in zip(rest, again, strict=False):
            outcomes[index] = outcome

    def _note_fetched(self, pages: Sequence[Page], outcomes: Sequence[Fetched]) -> None:
        both = list(zip(pages, outcomes, strict=True))
        self._presence.add(page.key for page, one in both if one.result is LoadResult.LOADED)
        lost = [page.key for page, one in both if one.result is not LoadResult.LOADED]
        if lost:
            self._presence.discard(*lost)
            self._router.invalidate(lost)

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Store each page in its first working shards, or in the next one if they store nothing."""
        results = [SpillResult.FAILED] * len(pages)
        if not pages:
            return results
        live = self._router.live()
        targets = [self._router.ranking(page.key, live) for page in pages]
        wanted = [ranked[: self._replicas] for ranked in targets]
        lost = self._spill_to(wanted, pages, results, deadline)
        unstored = [i for i, result in enumerate(results) if result > SpillResult.PRESENT]
        if unstored and lost and time.monotonic() < deadline:
            next_best = [
                [one for one in ranked if one not in lost and one not in tried][:1]
                if result > SpillResult.PRESENT
                else []
                for ranked, tried, result in zip(targets, wanted, results, strict=True)
            ]
            self._spill_to(next_best, pages, results, deadline)
        stored = zip(pages, results, strict=True)
        self._presence.add(page.key for page, result in stored if result <= SpillResult.PRESENT)
        return results

    def _spill_to(
        self,
        targets: Sequence[Sequence[int]],
        pages: Sequence[Page],
        results: list[SpillResult],
        deadline: float,
    ) -> set[int]:
        """Store each page in its targets, keeping its best result; return shards that took none."""
        groups: dict[int, list[int]] = {}
        for index, numbers in enumerate(targets):
            for number in numbers:
                groups.setdefault(number, []).append(index)
        calls = {
            number: partial(self._shards[number].tier.spill, [pages[i] for i in which], deadline)
            for number, which in groups.items()
        }
        lost: set[int] = set()
        for number, stored in self._calls.run(calls).items():
            if isinstance(stored, TierError) or min(stored) > SpillResult.PRESENT:
                lost.add(number)
            if isinstance(stored, TierError):
                continue  # `spill` must not raise
            for index, result in zip(groups[number], stored, strict=True):
                results[index] = min(results[index], result)
                if result <= SpillResult.PRESENT:
                    self._router.note(pages[index].key, number)
        return lost

    @override
    def touch(self, chain: Chain) -> None:
        for number, which in self._router.holders(chain).items():
            hashes = [chain.hashes[i] for i in which]
            self._shards[number].tier.touch(Chain(chain.namespace, hashes))

    @override
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        self._presence.discard(*keys)
        self._router.invalidate(keys)
        for shard in self._shards:
            shard.tier.invalidate(keys)

    @override
    def remove(self, keys: Sequence[PageKey]) -> int:
        """Remove the pages from every shard."""
        held = self.present(list(dict.fromkeys(keys)), time.monotonic() + REMOVE_SECONDS)
        self._on_all(lambda tier: tier.remove(keys))
        self.invalidate(keys)
        return sum(held)

    @override
    def describe(self, namespace: Namespace) -> None:
        """Store the description in every shard. Raises `TierError` if one of them fails."""
        self._on_all(lambda tier: tier.describe(namespace))

    @override
    def namespaces(self) -> dict[bytes, Namespace]:
        """Return the namespaces of all shards that answer; raises `TierError` if none does."""
        return {
            digest: namespace
            for found in self._on_any(lambda tier: tier.namespaces())
            for digest, namespace in found.items()
        }

    @override
    def clear(self, namespace: bytes) -> int:
        """Clear every shard; return the number of copies removed."""
        try:
            return sum(self._on_all(lambda tier: tier.clear(namespace)))
        finally:
            self._presence.forget(namespace)
            self._router.forget(namespace)

    @override
    def hide(self, namespace: bytes) -> int:
        try:
            return sum(self._on_all(lambda tier: tier.hide(namespace)))
        finally:
            self._presence.forget(namespace)
            self._router.forget(namespace)

    def _on_each(self, call: Callable[[Tier], T]) -> dict[int, T | TierError]:
        return self._calls.run(
            {number: partial(call, shard.tier) for number, shard in enumerate(self._shards)}
        )

    def _on_all(self, call: Callable[[Tier], T]) -> list[T]:
        """Make a call to every shard. Afterwards, raise the first `TierError`, if any."""
        done: list[T] = []
        failure: TierError | None = None
        for number, result in self._on_each(call).items():
            if isinstance(result, TierError):
                failure = failure or TierError(f"shard {self._shards[number].name}: {result}")
            else:
                done.append(result)
        if failure is not None:
            raise failure
        return done

    def _on_any(self, call: Callable[[Tier], T]) -> list[T]:
        """Make a call to every shard; return the results. Raise `TierError` if all calls failed."""
        results = self._on_each(call).values()
        done = [result for result in results if not isinstance(result, TierError)]
        if not done:
            raise TierError(", ".join(map(str, results)))
        return done

    @override
    def usage(self) -> TierUsage:
        """Return the sum over all shards."""
        usages = [shard.tier.usage() for shard in self._shards]
        capacities = [usage.capacity for usage in usages if usage.capacity is not None]
        return TierUsage(
            pages=sum(usage.pages for usage in usages),
            bytes=sum(usage.bytes for usage in usages),
            capacity=sum(capacities) if len(capacities) == len(usages) else None,
            evicted=sum(usage.evicted for usage in usages),
        )

    @override
    def problem(self) -> str | None:
        """Return which shards do not work, with the reasons."""
        problems = {shard.name: shard.tier.problem() for shard in self._shards}
        failing = [f"shard {name}: {problem}" for name, problem in problems.items() if problem]
        if failing:
            return "; ".join(failing)
        return None if None in problems.values() else ""

    @override
    def check_integrity(self) -> list[str]:
        return self._presence.check_integrity() + [
            f"shard {shard.name}: {line}"
            for shard in self._shards
            for line in shard.tier.check_integrity()
        ]

    @override
    def close(self, deadline: float = math.inf) -> None:
        self._calls.run(
            {
                number: partial(shard.tier.close, deadline)
                for number, shard in enumerate(self._shards)
            }
        )
        self._calls.close()

    def record_access(self, chain: Chain, positions: Sequence[int] | None = None) -> None:
        """Record each page's use in the shards that store it. See `AccessRecorder`."""
        for number, which in self._router.holders(chain).items():
            uses = self._shards[number].uses
            if uses is not None:
                uses.record_access(
                    Chain(chain.namespace, [chain.hashes[i] for i in which]),
                    None if positions is None else [positions[i] for i in which],
                )

    def flush_accesses(self, timeout: float) -> bool:
        """Flush every shard. Returns False if one of them fails. See `AccessRecorder`."""
        flushes = {
            number: partial(shard.uses.flush_accesses, timeout)
            for number, shard in enumerate(self._shards)
            if shard.uses is not None
        }
        return all(flushed is True for flushed in self._calls.run(flushes).values())

    def read_pins(self) -> Collection[PageKey]:
        """Return the pins of all shards that answer. See `PinReader`."""
        calls = {
            number: shard.pins.read_pins
            for number, shard in enumerate(self._shards)
            if shard.pins is not None
        }
        results = self._calls.run(calls).values()
        failures = [result for result in results if isinstance(result, TierError)]
        if failures and len(failures) == len(calls):
            raise failures[0]
        return {key for pins in results if not isinstance(pins, TierError) for key in pins}


def _groups(places: Sequence[int | None]) -> dict[int, list[int]]:
    """Return the indices of the pages of each shard."""
    groups: dict[int, list[int]] = {}
    for index, number in enumerate(places):
        if number is not None:
            groups.setdefault(number, []).append(index)
    return groups


def _first_miss(outcomes: Sequence[Fetched]) -> int:
    misses = (i for i, one in enumerate(outcomes) if one.result is not LoadResult.LOADED)
    return next(misses, len(outcomes))
