"""The shards of a sharded tier as the engine sees them: their circuit breakers and states."""

from collections.abc import Sequence
from typing import NamedTuple

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.breaker import BreakerState, BreakerTier, CircuitBreaker
from memkv_sglang.engine.measured import MeasuredTier
from memkv_sglang.engine.status import ShardStatus
from memkv_sglang.metrics import ShardMetrics
from memkv_sglang.tiers.base import Tier


class GuardedShard(NamedTuple):
    """A shard with a circuit breaker of its own, through which calls to `tier` go."""

    name: str
    tier: Tier
    breaker: CircuitBreaker
    metrics: ShardMetrics

    def works(self) -> bool:
        """Return whether the breaker would let a call through."""
        return self.breaker.state is not BreakerState.OPEN

    def status(self) -> ShardStatus:
        """Return the shard's state, and update its gauges. Does no I/O."""
        usage = self.tier.usage()
        status = ShardStatus(
            name=self.name,
            problem=self.tier.problem(),
            breaker=self.breaker.state.value,
            pages=usage.pages,
            bytes=usage.bytes,
            capacity=usage.capacity,
            evicted=usage.evicted,
        )
        self.metrics.update(status)
        return status


def guard_shard(name: str, tier: Tier, config: EngineConfig, metrics: ShardMetrics) -> GuardedShard:
    """Measure a shard's calls and put a circuit breaker in front of them."""
    breaker = CircuitBreaker(
        f"{tier.name}, shard {name}", config.breaker_failures, config.breaker_cooldown
    )
    # Measure inside the breaker, so that calls that it rejects do not count as fast.
    measured = MeasuredTier(tier, metrics.calls, name)
    metrics.add_shard(name)
    return GuardedShard(name, BreakerTier(measured, breaker), breaker, metrics)


class JointBreaker:
    """The joint state of several shards' breakers, which is open only if all of them are."""

    def __init__(self, shards: Sequence[GuardedShard]) -> None:
        """Read the state of these breakers whenever it is needed."""
        self._shards = shards

    @property
    def state(self) -> BreakerState:
        """The best state of any shard."""
        states = {shard.breaker.state for shard in self._shards}
        for state in (BreakerState.CLOSED, BreakerState.HALF_OPEN):
            if state in states:
                return state
        return BreakerState.OPEN
