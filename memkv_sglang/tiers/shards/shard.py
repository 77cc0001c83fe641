"""One shard, and calls to several shards at once."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

from memkv_sglang.tiers.base import AccessRecorder, PinReader, Tier, TierError
from memkv_sglang.tiers.parallel import run_in_parallel

T = TypeVar("T")

CONCURRENT_CALLS = 32
"""Number of calls to one shard that run at once in threads of their own. Further calls wait."""


def _always() -> bool:
    return True


def _no_delay() -> float:
    return 0.0


class Shard(NamedTuple):
    """A complete tier that holds a share of the pages."""

    name: str
    """Name of the shard, which decides which pages belong to it."""
    tier: Tier
    works: Callable[[], bool] = _always
    """Whether to attempt calls, for example by the state of a circuit breaker. Does not block."""
    uses: AccessRecorder | None = None
    pins: PinReader | None = None
    round_trip: Callable[[], float] = _no_delay
    """Measured seconds from a request to its response."""


class ShardCalls:
    """Runs calls to several shards at once. Thread-safe.

    Each shard has threads of its own, so that one that hangs does not delay the others.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Create the thread pools. Threads are started when they are needed."""
        self._executors = [
            ThreadPoolExecutor(CONCURRENT_CALLS, thread_name_prefix=f"memkv-shard-{shard.name}")
            for shard in shards
        ]

    def run(self, calls: Mapping[int, Callable[[], T]]) -> dict[int, T | TierError]:
        """Make one call to each of some shards; return its result or the `TierError` it raised.

        The keys are the numbers of the shards. Blocks until every call has returned, even if one of
        them raises another exception; that exception is raised afterwards. The last call runs in
        the caller's thread.
        """
        results = run_in_parallel(
            [(self._executors[number], partial(_attempt, call)) for number, call in calls.items()]
        )
        return dict(zip(calls, results, strict=True))

    def close(self) -> None:
        """End the threads after their calls, without waiting for them. Idempotent."""
        for executor in self._executors:
            executor.shutdown(wait=False)


def _attempt(call: Callable[[], T]) -> T | TierError:
    try:
        return call()
    except TierError as error:
        return error
