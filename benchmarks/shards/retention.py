"""Measure how much of each conversation survives when a shard fails, returns or is added.

Uses the sharded tier over shards in memory, with tiny pages.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

from benchmarks.shards.placements import PLACEMENTS, RunPlacement, conversations
from memkv_sglang.page import Chain, Page
from memkv_sglang.testing.pages import make_namespace
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.shards import Shard, ShardedTier

GROUPS, GROUP = 2, 4
"""Number of system prompts, and of conversations with each of them."""

PAGES = 1920
"""Pages per conversation: 123K tokens in pages of 64 tokens, the average of coding agents."""

PROMPT = 320
"""Pages of a system prompt: 20K tokens."""

DIES, AGAIN, RETURNS, ADDED = "dies", "lost pages computed again", "returns", "one is added"


def measure(count: int, placement: str, replicas: int, groups: int = GROUPS) -> dict[str, float]:
    """Return, by event, the share of all tokens that can be loaded as part of a prefix."""
    namespace = make_namespace(page_bytes=8).digest
    chains = [
        chain
        for group in range(groups)
        for chain in conversations(namespace, GROUP, PAGES, PROMPT, f"group {group}")
    ]
    cluster = _Cluster(count, PLACEMENTS[placement], chains, replicas)
    cluster.store(chains)
    found = {ADDED: cluster.retained(count + 1)}
    kept = []
    for cluster.dead in range(count):
        kept.append(cluster.retained(count))
    found[DIES] = math.fsum(kept) / count
    cluster.store(chains)
    found[AGAIN] = cluster.retained(count)
    cluster.dead = None
    found[RETURNS] = cluster.retained(count)
    return found


class _Cluster:
    """Shards in memory, one of which may be down."""

    def __init__(self, count: int, length: int, chains: Sequence[Chain], replicas: int) -> None:
        self._chains = chains
        self._length = length
        self._replicas = replicas
        self._count = count
        self._tiers = [MemoryTier(name=f"s{number}") for number in range(count + 1)]
        self.dead: int | None = None

    def _open(self, count: int) -> ShardedTier:
        names = [f"s{number}" for number in range(count)]
        shards = [
            Shard(name, self._tiers[number], works=partial(self._works, number))
            for number, name in enumerate(names)
        ]
        return ShardedTier(
            "memory",
            shards,
            replicas=self._replicas,
            placement=RunPlacement(names, self._chains, self._length),
        )

    def _works(self, number: int) -> bool:
        return number != self.dead

    def store(self, chains: Iterable[Chain]) -> None:
        """Store all pages that are missing."""
        tier = self._open(self._count)
        for chain in chains:
            pages = [Page(key, (memoryview(key.hash[:8]),)) for key in chain.keys()]
            tier.spill(pages, math.inf)
        tier.close()

    def retained(self, count: int) -> float:
        """Return the share of pages that a new node can load as part of a prefix."""
        tier = self._open(count)
        found = 0
        for chain in self._chains:
            present = [*tier.present(chain.keys(), math.inf), False]
            found += present.index(False)
        tier.close()
        return found / sum(len(chain.hashes) for chain in self._chains)
