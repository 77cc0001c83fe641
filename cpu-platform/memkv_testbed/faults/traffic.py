"""Callers that behave like servers: they spill, look up and load, and check every page."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_testbed.chain_memory import ChainMemory
from memkv_testbed.faults.cluster import NAMESPACE, PAGE_BYTES
from memkv_testbed.faults.node import Node
from memkv_testbed.faults.tally import Tally

LONGEST = 12
"""Number of pages in the longest chain."""

PAUSE = 0.01
"""Seconds between two calls of a caller, so that rounds of faults do not fill the disks."""

T = TypeVar("T")

SETTLE = 0.02
"""Seconds after a failed load before its pages are reused, in which a late write would show."""

LATE = 1.0
"""Seconds beyond its limit after which a call counts as hung. Machines may be busy."""


class Caller:
    """A client of a node, with host memory of its own. Not thread-safe."""

    def __init__(
        self, node: Node, seed: str, longest: int = LONGEST, remember: int | None = None
    ) -> None:
        """Connect. `seed` determines the chains; the last `remember` (None: all) are kept."""
        self.tally = Tally()
        self.acknowledged: deque[Chain] = deque(maxlen=remember)
        """Chains all of whose pages were acknowledged as stored."""
        self.client = node.connect()
        self._engine: EngineConfig = node.config.engine
        self._memory = ChainMemory(self.client, longest, PAGE_BYTES)
        self._random = random.Random(seed)  # noqa: S311 - not a secret
        self._seed = seed
        self._longest = longest
        self._spills = 0
        self._left: bytes | None = None
        """If the last load failed, the content of the memory when it returned."""
        self._left_at = 0.0

    def step(self) -> None:
        """Make one call of any kind."""
        kind = self._random.random()
        if kind < 0.35 or not self.acknowledged:
            self.spill()
        elif kind < 0.65:
            self.lookup(self._random.choice(self.acknowledged))
        else:
            self.load(self._random.choice(self.acknowledged))

    def spill(self) -> int:
        """Spill a new chain; return how many of its pages were acknowledged."""
        self._check_unchanged()
        self._spills += 1
        length = self._random.randint(1, self._longest)
        chain = make_chain(NAMESPACE, length, f"{self._seed}/{self._spills}")
        results = self._timed(self.tally.moves, self._move_limit, self._memory.spill, chain)
        kept = _first(results, SpillResult.STORED, SpillResult.PRESENT)
        if kept:
            self.acknowledged.append(Chain(chain.namespace, chain.hashes[:kept]))
        return kept

    def lookup(self, chain: Chain) -> None:
        """Look up a stored chain that continues with a page that was never stored."""
        stranger = make_chain(NAMESPACE, 1, f"{self._seed}/{self._spills}/never").hashes
        asked = Chain(chain.namespace, [*chain.hashes, *stranger])
        found = self._timed(self.tally.lookups, self._lookup_limit, self.client.lookup, asked)
        if found is not None:
            self.tally.wrong += found.length > len(chain.hashes)

    def load(self, chain: Chain) -> int:
        """Load a chain and compare its pages; return how many were loaded."""
        self._check_unchanged()
        loads = self._timed(self.tally.moves, self._move_limit, self._memory.load, chain)
        loaded = _first([load.result for load in loads or ()], LoadResult.LOADED)
        keys = chain.keys()
        self.tally.wrong += sum(not self._memory.holds(i, keys[i]) for i in range(loaded))
        self.tally.hits += loaded
        self.tally.misses += len(keys) - loaded
        if loaded < len(keys) and not self.client.withholding:
            self._left, self._left_at = self._memory.content(), time.monotonic()
        return loaded

    def _check_unchanged(self) -> None:
        """Count the pages that changed after a failed load had returned, before they are reused."""
        if self._left is None or self.client.withholding:
            return
        time.sleep(max(0.0, self._left_at + SETTLE - time.monotonic()))
        left, self._left = self._left, None
        if left != self._memory.content():
            self.tally.changed += self._memory.changed_pages(left)

    @property
    def _move_limit(self) -> float:
        return self._engine.batch_deadline

    @property
    def _lookup_limit(self) -> float:
        return self._engine.lookup_budget

    def _timed(
        self, times: list[float], limit: float, call: Callable[[Chain], T], chain: Chain
    ) -> T | None:
        began = time.monotonic()
        self.tally.calls += 1
        try:
            return call(chain)
        except Exception as error:  # A fault must never make a call raise.
            self.tally.errors.append(repr(error))
            return None
        finally:
            seconds = time.monotonic() - began
            times.append(seconds)
            self.tally.hung += seconds > limit + LATE

    def take(self) -> Tally:
        """Return the counts since the last call."""
        tally, self.tally = self.tally, Tally()
        return tally

    def close(self) -> None:
        """Disconnect."""
        self.client.close()


class Traffic:
    """Runs callers, each in its own thread, while the block runs."""

    def __init__(self, callers: Sequence[Caller], pause: float = PAUSE) -> None:
        """Prepare the threads. `pause` is the seconds between two calls of a caller."""
        self._pause = pause
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(caller,), daemon=True) for caller in callers
        ]

    def _run(self, caller: Caller) -> None:
        while not self._stopped.wait(self._pause):
            caller.step()

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


def _first(results: Sequence[object] | None, *wanted: object) -> int:
    """Return how many results from the first on are among the wanted ones."""
    return next((i for i, r in enumerate(results or ()) if r not in wanted), len(results or ()))
