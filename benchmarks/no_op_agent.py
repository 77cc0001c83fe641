"""An agent with a no-op tier, started like a real agent, to measure the agent alone."""

import os
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from memkv_sglang.agent.launched import run_launched
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult, Lookup, SpillResult
from memkv_sglang.tiers.memory import MemoryTier


class NoOpTier(MemoryTier):
    """Claims to hold every page and does no I/O."""

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Return the whole chain."""
        return Lookup(len(chain.hashes), complete=True)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Say yes."""
        return [True] * len(keys)

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Leave the buffers as they are."""
        return [Fetched(LoadResult.LOADED)] * len(pages)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Store nothing."""
        return [SpillResult.STORED] * len(pages)


def build(config: Config, registry: CollectorRegistry) -> Engine:
    """Return an engine over the tier."""
    return Engine(NoOpTier(), None, None, config.engine, Metrics(registry))


if __name__ == "__main__":
    text = sys.stdin.buffer.read()
    if os.fork():  # The starter waits for this process, which leaves the agent behind as a daemon.
        os._exit(0)
    sys.exit(run_launched(text, int(sys.argv[1]), build))
