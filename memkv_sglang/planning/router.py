"""Choose the replica that serves a request."""

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from memkv_sglang.planning.scenario import Scenario
from memkv_sglang.planning.workload import Turn


class Worker(Protocol):
    """What a router knows about a replica."""

    @property
    def jobs(self) -> int:
        """Number of requests assigned and not yet answered."""


class Router(Protocol):
    """Chooses a worker for each request."""

    def choose(self, session: int, turn: Turn) -> int:
        """Return the index of the worker that gets this turn of a session."""


class RoundRobin:
    """Chooses the workers in turn."""

    def __init__(self, workers: int) -> None:
        """Begin with the first of these workers."""
        self._workers = workers
        self._next = -1

    def choose(self, session: int, turn: Turn) -> int:
        """See `Router`."""
        self._next = (self._next + 1) % self._workers
        return self._next


class LeastLoaded:
    """Chooses the worker with the fewest requests. In a tie, workers take turns."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        """Choose among these workers."""
        self._workers = workers
        self._first = 0

    def choose(self, session: int, turn: Turn) -> int:
        """See `Router`."""
        self._first = (self._first + 1) % len(self._workers)
        order = (*range(self._first, len(self._workers)), *range(self._first))
        chosen: int = min(order, key=lambda number: self._workers[number].jobs)
        return chosen


class Sticky:
    """Keeps a session on its worker, except for a share of turns, which move to another worker."""

    def __init__(self, workers: int, moves: float, seed: int) -> None:
        """Send a turn to another worker with probability `moves`."""
        self._workers = workers
        self._moves = moves
        self._rng = random.Random(seed)
        self._homes: dict[int, int] = {}

    def choose(self, session: int, turn: Turn) -> int:
        """See `Router`."""
        home = self._homes.get(session, session % self._workers)
        if self._moves and self._rng.random() < self._moves:
            home = self._rng.randrange(self._workers)
        self._homes[session] = home
        return home

    def forget(self, session: int) -> None:
        """Forget a session that has ended."""
        self._homes.pop(session, None)


class _Sent(NamedTuple):
    worker: int
    pages: int


class CacheAware:
    """SGLang's cache-aware policy, as in sglang-router 0.3.2.

    If the longest and the shortest queue differ by more than `absolute` requests and by more than
    the factor `relative`, the shortest queue gets the request. Otherwise, the worker whose history
    matches the longest prefix gets it, if that is more than `threshold` of the prompt. If not, the
    worker with the smallest history gets it. Unlike the router's character tree, histories are kept
    by session and by shared prefix.
    """

    _REMEMBERED = 1 << 20

    def __init__(
        self, workers: Sequence[Worker], threshold: float, absolute: int, relative: float
    ) -> None:
        """Take the parameters of the router's command line."""
        self._workers = workers
        self._threshold = threshold
        self._absolute = absolute
        self._relative = relative
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._common: dict[int, int] = {}
        self._sizes = [0] * len(workers)

    def choose(self, session: int, turn: Turn) -> int:
        """See `Router`."""
        loads = [worker.jobs for worker in self._workers]
        longest, shortest = max(loads), min(loads)
        before = self._sent.get(session)
        if longest - shortest > self._absolute and longest > self._relative * shortest:
            chosen = loads.index(shortest)
        elif before and min(before.pages, turn.pages) > self._threshold * turn.pages:
            chosen = before.worker
        elif turn.shared_pages > self._threshold * turn.pages and turn.runs[0] in self._common:
            chosen = self._common[turn.runs[0]]
        else:
            chosen = min(range(len(loads)), key=self._sizes.__getitem__)
        known = before.pages if before and before.worker == chosen else 0
        self._sizes[chosen] += max(0, turn.pages - known)
        self._sent[session] = _Sent(chosen, turn.pages)
        self._sent.move_to_end(session)
        if len(self._sent) > self._REMEMBERED:
            gone = self._sent.popitem(last=False)[1]
            self._sizes[gone.worker] -= gone.pages
        if turn.shared_pages:
            self._common[turn.runs[0]] = chosen
        return chosen


class TierAware:
    """Compares the session's last worker with the least loaded one.

    It chooses the one with the shorter estimated time to first token: queueing, loading and
    prefill.
    """

    def __init__(self, workers: Sequence[Worker], estimate: Callable[[int, Turn], float]) -> None:
        """`estimate` returns the time to first token on a worker, in seconds."""
        self._least = LeastLoaded(workers)
        self._estimate = estimate
        self._homes: dict[int, int] = {}

    def choose(self, session: int, turn: Turn) -> int:
        """See `Router`."""
        least = self._least.choose(session, turn)
        home = self._homes.get(session, least)
        candidates = {home, least}
        chosen = min(sorted(candidates), key=lambda worker: self._estimate(worker, turn))
        self._homes[session] = chosen
        return chosen


def make_router(
    scenario: Scenario, workers: Sequence[Worker], estimate: Callable[[int, Turn], float]
) -> Router:
    """Return the router of a scenario."""
    if scenario.router == "round_robin":
        return RoundRobin(len(workers))
    if scenario.router == "least_loaded":
        return LeastLoaded(workers)
    if scenario.router == "cache_aware":
        return CacheAware(
            workers,
            scenario.cache_threshold,
            scenario.balance_absolute,
            scenario.balance_relative,
        )
    if scenario.router == "tier_aware":
        return TierAware(workers, estimate)
    return Sticky(len(workers), scenario.moves, scenario.seed)
