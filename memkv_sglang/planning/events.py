"""The simulator's clock and its queue of actions."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventLoop:
    """Runs actions at simulated times, in seconds. Actions at equal times run in order of arrival.

    It is a heap of callbacks, because generators would halve the simulator's speed.
    """

    def __init__(self) -> None:
        """Start at time 0 without actions."""
        self.now = 0.0
        self._heap: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, time: float, action: Action) -> None:
        """Run `action` at `time`, or now if `time` is in the past."""
        self._count += 1
        heapq.heappush(self._heap, (max(time, self.now), self._count, action))

    def after(self, delay: float, action: Action) -> None:
        """Run `action` in `delay` seconds."""
        self.at(self.now + delay, action)

    def run(self, until: float) -> None:
        """Run all actions due by `until`, inclusive, and set the clock to `until`."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action = heapq.heappop(heap)
            action()
        self.now = until
