"""Merge concurrent loads of a page: the first call loads it, and the others copy it."""

import threading
import time
from collections.abc import Sequence

from memkv_sglang.engine.results import Arrival
from memkv_sglang.page import Page, PageKey, scatter
from memkv_sglang.tiers.base import LoadResult


class Follower:
    """A page that another call, the leader, is loading."""

    def __init__(self, page: Page) -> None:
        """Wait for the leader to fill `page`."""
        self.page = page
        self.filled = threading.Event()
        self.claimed = False
        """Set by the leader, under the lock, before it writes to the page's buffers."""
        self.arrival = Arrival(LoadResult.FAILED)


class SingleFlight:
    """Matches concurrent loads by page key. Thread-safe.

    A call leads the pages that it loads and follows the others. It must finish all pages that it
    leads before it waits for those that it follows; otherwise two calls could deadlock.
    """

    def __init__(self) -> None:
        """Start with no loads in flight."""
        self._lock = threading.Lock()
        self._flights: dict[PageKey, list[Follower]] = {}

    def join(self, pages: Sequence[Page]) -> list[Follower | None]:
        """Register pages.

        Returns None for each page that the call must load and `finish`, and a follower to `wait`
        for if another call is loading the page.
        """
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
        """Report a page that this call led, and copy it to its followers.

        The leader's client may write to the page before it is copied, so followers must verify the
        arrival's checksum.
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
        """Wait for the leader. At the deadline, withdraw, so that it does not write later."""
        if not follower.filled.wait(max(0.0, deadline - time.monotonic())):
            with self._lock:
                if not follower.claimed:
                    self._flights[follower.page.key].remove(follower)
                    return Arrival(LoadResult.FAILED)
            follower.filled.wait()  # the leader is copying the page, which ends soon
        return follower.arrival


def _copy(source: Page, target: Page) -> bool:
    lengths = [[len(buffer) for buffer in page.buffers] for page in (source, target)]
    if lengths[0] == lengths[1]:
        for from_buffer, to_buffer in zip(source.buffers, target.buffers, strict=True):
            to_buffer[:] = from_buffer
        return True
    if source.length != target.length:
        return False
    scatter(memoryview(b"".join(source.buffers)), target.buffers)
    return True
