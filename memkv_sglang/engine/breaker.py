"""A circuit breaker: it stops calls to a tier that keeps failing, and probes the tier later."""

import enum
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult, Tier, TierError
from memkv_sglang.tiers.wrappers import WrapperTier

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


class BreakerState(enum.Enum):
    """The three states, named as in metrics and `memkv stats`."""

    CLOSED = "closed"
    """Every call goes through."""
    HALF_OPEN = "half_open"
    """Only one call, the probe, goes through. Its result decides the next state."""
    OPEN = "open"
    """No call goes through."""


class Breaker(Protocol):
    """Has the state of a circuit breaker."""

    @property
    def state(self) -> BreakerState:
        """The state that the next call will see."""


class CircuitBreaker:
    """Opens after consecutive failures; lets a probe through after `open_seconds`. Thread-safe."""

    def __init__(self, name: str, failures: int, open_seconds: float) -> None:
        """Start closed. `name` is the tier's, for the log."""
        self._name = name
        self._threshold = failures
        self._open_seconds = open_seconds
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._retry_at = 0.0

    @property
    def state(self) -> BreakerState:
        """The state that the next call will see."""
        with self._lock:
            due = self._state is BreakerState.OPEN and time.monotonic() >= self._retry_at
            return BreakerState.HALF_OPEN if due else self._state

    def admit(self) -> bool:
        """Return whether a call may go through. If it may, the caller must `record` its result."""
        with self._lock:
            if self._state is BreakerState.CLOSED:
                return True
            if time.monotonic() < self._retry_at:
                return False
            # This call is the probe. If its result is never recorded, another probe follows.
            self._state = BreakerState.HALF_OPEN
            self._retry_at = time.monotonic() + self._open_seconds
            return True

    def record(self, success: bool | None) -> None:
        """Record whether a call succeeded; None if it did not reach the medium.

        Such a call, which the tier answered from a cache, does not affect the state.
        """
        with self._lock:
            before = self._state
            if success is None:
                # The probe showed nothing, so let another one through at once.
                self._retry_at = 0.0
            elif success:
                self._failures, self._state = 0, BreakerState.CLOSED
            else:
                self._failures += 1
                if self._failures >= self._threshold:
                    self._state = BreakerState.OPEN
                    self._retry_at = time.monotonic() + self._open_seconds
            after = self._state
        if BreakerState.CLOSED in (before, after) and before is not after:
            event = "circuit closed" if after is BreakerState.CLOSED else "circuit opened"
            log.warning(event, extra={"fields": {"tier": self._name}})


class BreakerTier(WrapperTier):
    """Lets the breaker admit each call to the tier, and records the result."""

    def __init__(self, inner: Tier, breaker: CircuitBreaker) -> None:
        """Guard `inner`. Control calls, such as descriptions and removals, always go through."""
        super().__init__(inner)
        self.breaker = breaker

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Look up. Raises `TierError` while the circuit is open."""
        found = self._guarded(super().lookup, chain, deadline)
        # Only a full hit can come entirely from the presence cache.
        maybe_cached = found.complete and found.length == len(chain.hashes)
        self.breaker.record(None if maybe_cached else found.complete)
        return found

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Check presence. Raises `TierError` while the circuit is open."""
        found = self._guarded(super().present, keys, deadline)
        self.breaker.record(None if all(found) else True)
        return found

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load. While the circuit is open, every page fails at once."""
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
        """Spill. While the circuit is open, every page fails at once."""
        if not pages or not self.breaker.admit():
            return [SpillResult.FAILED] * len(pages)
        results = super().spill(pages, deadline)
        if SpillResult.FAILED in results:
            # Count only one failure, because the tier does not try the pages after it.
            self.breaker.record(False)
        else:
            maybe_cached = set(results) == {SpillResult.PRESENT}
            self.breaker.record(None if maybe_cached else True)
        return results

    def _guarded(self, call: Callable[[T, float], R], argument: T, deadline: float) -> R:
        if not self.breaker.admit():
            raise TierError(f"{self.name}: circuit open")
        try:
            return call(argument, deadline)
        except TierError:
            self.breaker.record(False)
            raise
