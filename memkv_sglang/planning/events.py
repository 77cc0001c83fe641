"""The simulator's clock: actions in the order of their times."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventLoop:
    """Runs actions at simulated times, in seconds. Actions at equal times run in order of arrival.

    A heap of callbacks: a simulation needs no more, and generators would halve its speed.
    """

    def __init__(self) -> None:
        """Start at time 0 without actions."""
        self.now = 0.0
        self._heap: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, time: float, action: Action) -> None:
        """Run `action` at `time`, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, action))

    def after(self, delay: float, action: Action) -> None:
        """Run `action` in `delay` seconds."""
        self.at(self.now + delay, action)

    def run(self, until: float) -> None:
        """Run the actions up to and including the time `until`, and set the clock to it."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action = heapq.heappop(heap)
            action()
        self.now = until
