"""Move pages through an agent, as the storage class does inside SGLang."""

from benchmarks.peers.base import CALL, PeerFailedError
from benchmarks.pool import HostPool
from memkv_sglang.client.client import AgentClient
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.tiers.base import LoadResult, SpillResult


class PagesThroughAgent:
    """All pages of one pool."""

    def __init__(
        self, client: AgentClient, pool: HostPool, seed: str, pages_per_call: int = CALL
    ) -> None:
        """Register the pool and the namespace with the agent; by default, for SGLang's calls."""
        self._client = client
        self._call = pages_per_call
        self._seed = seed
        namespace = make_namespace(page_bytes=pool.page_bytes)
        client.describe(namespace)
        number = client.register_pool(pool.descriptor, pool.length)
        self._buffers = pool.buffers(number, range(pool.pages))
        self._namespace = namespace.digest
        self.chain = self._make_chain(0)
        self._round = 0

    def renew(self) -> None:
        """Continue with keys that are not stored."""
        self._round += 1
        self.chain = self._make_chain(self._round)

    def spill(self) -> None:
        """Spill all pages in calls. Raises `PeerFailedError`."""
        for first in range(0, len(self._buffers), self._call):
            part = Chain(self._namespace, self.chain.hashes[first : first + self._call])
            before = self.chain.hashes[:first]
            results = self._client.spill(part, self._buffers[first : first + self._call], before)
            if set(results) != {SpillResult.STORED}:
                raise PeerFailedError(f"spill through the agent: {set(results)}")

    def load(self) -> None:
        """Load all pages in calls. Raises `PeerFailedError`."""
        for first in range(0, len(self._buffers), self._call):
            part = Chain(self._namespace, self.chain.hashes[first : first + self._call])
            loads = self._client.load(part, self._buffers[first : first + self._call])
            if {load.result for load in loads} != {LoadResult.LOADED}:
                raise PeerFailedError(f"load through the agent: {set(loads)}")

    def _make_chain(self, number: int) -> Chain:
        return Chain(self._namespace, make_hashes(len(self._buffers), f"{self._seed} {number}"))
