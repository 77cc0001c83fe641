"""Equal loads in flight are one: the first call fetches, the others take a copy."""

import threading
import time
from collections.abc import Sequence

from memkv_sglang.engine.results import Arrival
from memkv_sglang.page import Page, PageKey, scatter
from memkv_sglang.tiers.base import LoadResult


class Follower:
    """A page whose content another call is fetching."""

    def __init__(self, page: Page) -> None:
        """Wait for an equal page to be filled."""
        self.page = page
        self.filled = threading.Event()
        self.claimed = False
        """Set, under the lock, by the leader that is about to write into the page's buffers."""
        self.arrival = Arrival(LoadResult.FAILED)


class SingleFlight:
    """Pairs pages of equal key. Thread-safe.

    A call must first finish every page that it leads, then wait for those that it follows: so two
    calls that follow each other cannot wait in a circle.
    """

    def __init__(self) -> None:
        """Nothing is in flight."""
        self._lock = threading.Lock()
        self._flights: dict[PageKey, list[Follower]] = {}

    def join(self, pages: Sequence[Page]) -> list[Follower | None]:
        """Enter pages: None where this call leads and must `finish`, else what to `wait` for."""
        with self._lock:
            return [self._join_one(page) for page in pages]

    def _join_one(self, page: Page) -> Follower | None:
        followers = self._flights.get(page.key)
        if followers is None:
            self._flights[page.key] = []
            return None
        follower = Follower(page)
        followers.append(follower)
        return follower

    def finish(self, page: Page, arrival: Arrival) -> None:
        """End a flight that this call leads, copying what was loaded to everyone who waits.

        The leader's client may write into the page before it is copied, so that followers must
        check what they got against the arrival's checksum.
        """
        with self._lock:
            followers = self._flights.pop(page.key)
            for follower in followers:
                follower.claimed = True
        for follower in followers:
            follower.arrival = arrival
            if arrival.result is LoadResult.LOADED and not _copy(page, follower.page):
                follower.arrival = Arrival(LoadResult.FAILED)
            follower.filled.set()

    def wait(self, follower: Follower, deadline: float) -> Arrival:
        """Wait for the leader; at the deadline withdraw, so that nobody writes after this call."""
        if not follower.filled.wait(max(0.0, deadline - time.monotonic())):
            with self._lock:
                if not follower.claimed:
                    self._flights[follower.page.key].remove(follower)
                    return Arrival(LoadResult.FAILED)
            follower.filled.wait()  # a copy in memory is under way and ends soon
        return follower.arrival


def _copy(source: Page, target: Page) -> bool:
    lengths = [[len(buffer) for buffer in page.buffers] for page in (source, target)]
    if lengths[0] == lengths[1]:
        for theirs, mine in zip(source.buffers, target.buffers, strict=True):
            mine[:] = theirs
        return True
    if source.length != target.length:
        return False
    scatter(memoryview(b"".join(source.buffers)), target.buffers)
    return True
