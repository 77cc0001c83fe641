"""A circuit breaker: a tier that keeps failing is left alone for a while, then tried carefully."""

import enum
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier, TierError
from memkv_sglang.tiers.wrappers import WrapperTier

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


class BreakerState(enum.Enum):
    """The three states, named as in metrics and `memkv stats`."""

    CLOSED = "closed"
    """All calls go through."""
    HALF_OPEN = "half_open"
    """One call, the probe, goes through; its result decides the next state."""
    OPEN = "open"
    """No call goes through."""


class CircuitBreaker:
    """Opens after `failures` in a row, lets one call through after `open_seconds`. Thread-safe."""

    def __init__(self, name: str, failures: int, open_seconds: float) -> None:
        """Begin closed; `name` is for the log."""
        self._name = name
        self._threshold = failures
        self._open_seconds = open_seconds
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._retry_at = 0.0

    @property
    def state(self) -> BreakerState:
        """The state that the next call will find."""
        with self._lock:
            due = self._state is BreakerState.OPEN and time.monotonic() >= self._retry_at
            return BreakerState.HALF_OPEN if due else self._state

    def admit(self) -> bool:
        """Tell whether a call may go through; if so, `record` must follow."""
        with self._lock:
            if self._state is BreakerState.CLOSED:
                return True
            if time.monotonic() < self._retry_at:
                return False
            # The call admitted now is the probe; it has as long to answer as the circuit was open.
            self._state = BreakerState.HALF_OPEN
            self._retry_at = time.monotonic() + self._open_seconds
            return True

    def record(self, verdict: bool | None) -> None:
        """Take in what a call told of the tier: it works, it does not, or nothing (None).

        A call that was answered from what the tier knows of itself tells nothing.
        """
        with self._lock:
            before = self._state
            if verdict is None:
                self._retry_at = 0.0  # a probe without a verdict makes room for the next
            elif verdict:
                self._failures, self._state = 0, BreakerState.CLOSED
            else:
                self._failures += 1
                if self._failures >= self._threshold:
                    self._state = BreakerState.OPEN
                    self._retry_at = time.monotonic() + self._open_seconds
            after = self._state
        if BreakerState.CLOSED in (before, after) and before is not after:
            word = "circuit closed" if after is BreakerState.CLOSED else "circuit opened"
            log.warning(word, extra={"fields": {"tier": self._name}})


class BreakerTier(WrapperTier):
    """Asks the breaker before each call to the tier, and tells it what came of it."""

    def __init__(self, inner: Tier, breaker: CircuitBreaker) -> None:
        """Guard `inner`; control calls (descriptions, removal) pass without asking."""
        super().__init__(inner)
        self.breaker = breaker

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Look up; raises `TierError` while the circuit is open."""
        found = self._guarded(super().lookup, chain, deadline)
        # A whole chain may be known to be there; one that ends somewhere had to be asked for.
        known = found.complete and found.length == len(chain.hashes)
        self.breaker.record(None if known else found.complete)
        return found

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Ask; raises `TierError` while the circuit is open."""
        found = self._guarded(super().present, keys, deadline)
        self.breaker.record(None if all(found) else True)
        return found

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load; every page fails at once while the circuit is open."""
        if not pages or not self.breaker.admit():
            return [Fetched(LoadResult.FAILED)] * len(pages)
        outcomes = super().fetch(pages, deadline)
        failures = sum(fetched.result is LoadResult.FAILED for fetched in outcomes)
        for _ in range(failures):
            self.breaker.record(False)
        if not failures:
            self.breaker.record(True)
        return outcomes

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Spill; every page fails at once while the circuit is open."""
        if not pages or not self.breaker.admit():
            return [SpillResult.FAILED] * len(pages)
        results = super().spill(pages, deadline)
        if SpillResult.FAILED in results:  # once: those behind the first were not even tried
            self.breaker.record(False)
        else:
            told = set(results) != {SpillResult.PRESENT}
            self.breaker.record(True if told else None)
        return results

    def _guarded(self, call: Callable[[T, float], R], asked: T, deadline: float) -> R:
        if not self.breaker.admit():
            raise TierError(f"{self.name}: circuit open")
        try:
            return call(asked, deadline)
        except TierError:
            self.breaker.record(False)
            raise
