"""Estimate how long a tier takes to load, from its latency, throughput and loads in flight."""

import threading
import time
from collections.abc import Callable

from memkv_sglang.time_model import TimeModel

MIN_HALF_LIFE, MAX_HALF_LIFE = 20.0, 600.0
"""Half-life of an estimate in seconds. After each half-life without a new measurement, the tier is
taken to be twice as fast, so that a slow tier is tried again. A measurement that confirms the
estimate doubles the half-life, up to the maximum; one that does not resets it to the minimum."""

SURPRISE = 2.0
"""An estimate is discarded if a measurement differs from it by more than this factor."""

BUSY_SAMPLES = 4
"""If the tier never becomes idle, a measurement ends after this many loads per load in flight. The
bytes that the loads in flight have already moved are then negligible."""


class TierSpeed:
    """Learns from finished loads how long a load takes. Thread-safe.

    Overlapping loads share the medium, so they are measured together: by their number and bytes,
    and by the time since the first of them began.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without an estimate."""
        self._clock = clock
        self._lock = threading.Lock()
        self._model = TimeModel()
        self._in_flight: list[int] = []
        self._begun = self._measured = self._period = clock()
        self._calls = self._asked = self._moved = 0
        self._half_life = MIN_HALF_LIFE

    def begin(self, size: int) -> None:
        """Record the start of a load of `size` bytes."""
        with self._lock:
            self._begun = self._clock()
            if not self._in_flight:
                self._period = self._begun
            self._in_flight.append(size)

    def end(self, size: int, moved: int, *, cut_short: bool = False) -> None:
        """Record the end of a load that moved `moved` bytes; 0 if it says nothing about the speed.

        `cut_short` says that the deadline ended the load. Its time is then extrapolated to `size`.
        """
        with self._lock:
            self._in_flight.remove(size)
            if moved:
                self._calls += 1
                self._moved += moved
                self._asked += size if cut_short else moved
            now = self._clock()
            if self._calls >= BUSY_SAMPLES * len(self._in_flight):
                if self._moved:
                    self._learn((now - self._period) * self._asked / self._moved)
                    self._measured = now
                self._period = now
                self._calls = self._asked = self._moved = 0

    def _learn(self, seconds: float) -> None:
        """Update the estimate with the number and bytes of the loads in this period."""
        least, most = self._model.bounds(self._calls, self._asked) or (0.0, 0.0)
        if not least / SURPRISE <= seconds <= most * SURPRISE:
            self._model = TimeModel()  # the speed has changed
            self._half_life = MIN_HALF_LIFE
        elif self._period - self._measured >= self._half_life:
            self._half_life = min(2 * self._half_life, MAX_HALF_LIFE)
        self._model.observe(self._calls, self._asked, seconds)

    def seconds(self, calls: int, size: int) -> float:
        """Return the estimated duration of a load that starts now; 0 if unknown."""
        with self._lock:
            predicted = self._model.predict(calls, size + sum(self._in_flight)) or 0.0
            age = self._clock() - max(self._measured, self._begun)
            return float(predicted * 0.5 ** (age / self._half_life))
