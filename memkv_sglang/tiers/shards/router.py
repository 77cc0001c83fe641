"""Find out where pages are, and choose shards for them."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.tiers.shards.placement import Placement
from memkv_sglang.tiers.shards.shard import Shard

CANDIDATES = 2
"""Maximum number of working shards to ask for a page: its first shard, and the next one if that
lacks the page.

The next shard has the page if it was stored while the first one was down or did not exist.
"""

DISPLACED_LIMIT = 200_000
"""Number of displaced pages to remember, which take about 50 MB."""


class Router:
    """Chooses shards for pages. Thread-safe; does no I/O.

    A page is usually in the first shards of its ranking. The router remembers the exceptions.
    """

    def __init__(self, shards: Sequence[Shard], placement: Placement, replicas: int) -> None:
        """Store each page in the first `replicas` working shards of its ranking."""
        self._shards = shards
        self._placement = placement
        self._replicas = replicas
        self._displaced = _DisplacedPages()

    def live(self) -> Collection[int]:
        """Return the numbers of the shards that work."""
        return {number for number, shard in enumerate(self._shards) if shard.works()}

    def home(self, key: PageKey) -> int:
        """Return the page's first shard, whether or not it works."""
        return self._placement.first(key)

    def places(self, keys: Sequence[PageKey], live: Collection[int]) -> list[int]:
        """Return for each page the shard in `live` that probably has it. `live` is not empty."""
        if len(live) == len(self._shards) and not self._displaced:
            return [self._placement.first(key) for key in keys]
        return [self.candidates(key, live)[0] for key in keys]

    def ranking(self, key: PageKey, live: Collection[int]) -> list[int]:
        """Return the page's ranking of the shards in `live`."""
        return [number for number in self._placement.order(key) if number in live]

    def candidates(self, key: PageKey, live: Collection[int]) -> list[int]:
        """Return the shards in `live` to ask for a page, the most likely one first."""
        ranked = self.ranking(key, live)
        place = self._displaced.get(key)
        if place is not None and place in ranked:
            ranked = [place, *(number for number in ranked if number != place)]
        return ranked[:CANDIDATES]

    def holders(self, chain: Chain) -> dict[int, list[int]]:
        """Return by shard the indices of the chain's pages that it holds if they are stored."""
        groups: dict[int, list[int]] = {}
        if self._replicas == 1 and not self._displaced:
            for index, key in enumerate(chain.keys()):
                groups.setdefault(self._placement.first(key), []).append(index)
            return groups
        for index, key in enumerate(chain.keys()):
            place = self._displaced.get(key)
            belongs = self._placement.order(key)[: self._replicas]
            for number in belongs if place is None else (place,):
                groups.setdefault(number, []).append(index)
        return groups

    def note(self, key: PageKey, number: int) -> None:
        """Record that a shard has a page. Only pages in an unexpected shard are remembered."""
        if number in self._placement.order(key)[: self._replicas]:
            self._displaced.discard([key])
        else:
            self._displaced.add(key, number)

    def invalidate(self, keys: Iterable[PageKey]) -> None:
        """Forget where displaced pages are."""
        self._displaced.discard(keys)

    def forget(self, namespace: bytes) -> None:
        """Forget where the displaced pages of a namespace are."""
        self._displaced.forget(namespace)


class _DisplacedPages:
    """Pages that are not in the shards they belong to, and where they are. Thread-safe.

    They were stored while their shards were down or not configured yet.
    """

    def __init__(self) -> None:
        self._places: OrderedDict[PageKey, int] = OrderedDict()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._places)

    def get(self, key: PageKey) -> int | None:
        """Return the number of the shard that has the page; None if it is not known."""
        return self._places.get(key) if self._places else None

    def add(self, key: PageKey, number: int) -> None:
        """Record which shard has a page. Above the limit, forget the oldest page."""
        with self._lock:
            self._places[key] = number
            while len(self._places) > DISPLACED_LIMIT:
                self._places.popitem(last=False)

    def discard(self, keys: Iterable[PageKey]) -> None:
        """Forget pages."""
        if self._places:
            with self._lock:
                for key in keys:
                    self._places.pop(key, None)

    def forget(self, namespace: bytes) -> None:
        """Forget all pages of a namespace."""
        with self._lock:
            for key in [key for key in self._places if key.namespace == namespace]:
                del self._places[key]
