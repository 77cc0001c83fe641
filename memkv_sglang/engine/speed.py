"""How fast a tier loads at the moment: its latency, its bytes a second, and what is in flight."""

import threading
import time
from collections.abc import Callable, Sequence

from memkv_sglang.page import Page
from memkv_sglang.tiers.base import Fetched, LoadResult, Tier
from memkv_sglang.tiers.wrappers import WrapperTier
from memkv_sglang.time_model import TimeModel

MIN_TRUST, MAX_TRUST = 20.0, 600.0
"""Seconds in which a speed that nobody has measured again is trusted half as much: a tier found
slow looks twice as fast after each, until a load measures it anew. What measuring again confirms
is trusted twice as long, up to the second; what it refutes, as long as the first."""

SURPRISE = 2.0
"""How many times longer or shorter than expected a load takes that refutes the expectation."""


TOGETHER = 4
"""How many loads, for each that is still in flight, are looked at together where there is no gap:
then what those have moved already matters little."""


class TierSpeed:
    """Learns from loads how long loads take. Thread-safe.

    Loads that overlap share the medium, so they are looked at together: how many there were, and
    what they moved, in the time from the first one's begin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Know nothing."""
        self._clock = clock
        self._lock = threading.Lock()
        self._model = TimeModel()
        self._in_flight: list[int] = []
        self._begun = self._measured = self._period = clock()
        self._calls = self._asked = self._moved = 0
        self._trust = MIN_TRUST

    def begin(self, size: int) -> None:
        """Take note of a load of `size` bytes that begins."""
        with self._lock:
            self._begun = self._clock()
            if not self._in_flight:
                self._period = self._begun
            self._in_flight.append(size)

    def end(self, size: int, moved: int, *, cut_short: bool = False) -> None:
        """Take note of its end, with the bytes that it moved; 0: there is nothing to learn.

        One that was `cut_short` by its deadline would have gone on as it had begun.
        """
        with self._lock:
            self._in_flight.remove(size)
            if moved:
                self._calls += 1
                self._moved += moved
                self._asked += size if cut_short else moved
            now = self._clock()
            if self._calls >= TOGETHER * len(self._in_flight):
                if self._moved:
                    self._learn((now - self._period) * self._asked / self._moved)
                    self._measured = now
                self._period = now
                self._calls = self._asked = self._moved = 0

    def _learn(self, seconds: float) -> None:
        """Believe that the calls and bytes of this period take so long."""
        least, most = self._model.bounds(self._calls, self._asked) or (0.0, 0.0)
        if not least / SURPRISE <= seconds <= most * SURPRISE:
            self._model = TimeModel()  # the speed is another one now
            self._trust = MIN_TRUST
        elif self._period - self._measured >= self._trust:
            self._trust = min(2 * self._trust, MAX_TRUST)
        self._model.observe(self._calls, self._asked, seconds)

    def seconds(self, calls: int, size: int) -> float:
        """Return how long a load would take that begins now; 0 if nothing is known."""
        with self._lock:
            predicted = self._model.predict(calls, size + sum(self._in_flight)) or 0.0
            age = self._clock() - max(self._measured, self._begun)
            return float(predicted * 0.5 ** (age / self._trust))


class SpeedTier(WrapperTier):
    """Lets a `TierSpeed` watch the loads."""

    def __init__(self, inner: Tier) -> None:
        """Begin without knowledge."""
        super().__init__(inner)
        self.speed = TierSpeed()

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load, and learn. A fault before the deadline says nothing of the speed."""
        size, moved, late = sum(page.length for page in pages), 0, False
        self.speed.begin(size)
        try:
            outcomes = super().fetch(pages, deadline)
            results = [fetched.result for fetched in outcomes]
            late = time.monotonic() >= deadline
            if late or LoadResult.FAILED not in results:
                loaded = zip(pages, results, strict=True)
                moved = sum(page.length for page, result in loaded if result is LoadResult.LOADED)
        finally:
            self.speed.end(size, moved, cut_short=late)
        return outcomes
