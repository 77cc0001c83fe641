"""The replay of upload rules makes the engine's decisions."""

import random

import pytest
from prometheus_client import CollectorRegistry

from benchmarks.trace.uploads import RULES, Nodes
from memkv_sglang.config.schema import EngineConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.uploads import UploadRule
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.planning.disk import NAMESPACE, page_hash
from memkv_sglang.testing.pages import make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.wrappers import WrapperTier

PLENTY = 10_000
"""Pages of a disk from which nothing is evicted."""


class KeptOpenTier(WrapperTier):
    """A shared tier that several engines use, none of which closes it."""

    def close(self, deadline: float = 0) -> None:
        pass


def requests() -> list[tuple[int, list[int]]]:
    """Return nodes and prompts: four conversations that share a system prompt and move around."""
    chance = random.Random(5)
    grown = {i: [0, 1] for i in range(4)}
    sent = []
    for number in range(60):
        session = chance.randrange(4)
        grown[session] = [*grown[session], *(100 + 10 * number + i for i in range(3))]
        sent.append((chance.randrange(4), grown[session]))
    return sent


def serve(engine: Engine, request: list[int]) -> int:
    """Look up, load and spill like a server with small pools; return the hits in pages."""
    keys = [PageKey(NAMESPACE, page_hash(page)) for page in request]
    hits = engine.lookup(Chain(NAMESPACE, [key.hash for key in keys]), budget=4.0).length
    loads = engine.load([make_page(key, (64,), filled=False) for key in keys[:hits]])
    assert all(one.result is LoadResult.LOADED for one in loads)
    before = [key.hash for key in keys[:hits]]
    engine.spill([make_page(key, (64,), filled=True) for key in keys[hits:]], before)
    assert engine.flush(60)
    return hits


@pytest.mark.parametrize("rule", RULES)
def test_hits_and_puts_are_those_of_real_engines(rule: UploadRule) -> None:
    shared = KeptOpenTier(MemoryTier(name="minio"))
    locals_ = [MemoryTier(name="nvme") for _ in range(4)]
    config = EngineConfig(upload=rule, skip_slow_loads=False)
    engines = [Engine(one, shared, one, config, Metrics(CollectorRegistry())) for one in locals_]
    simulated = Nodes(PLENTY, rule)
    for node, request in requests():
        assert simulated.serve(node, request) == serve(engines[node], request)
        assert simulated.puts == shared.usage().pages
    for engine in engines:
        engine.close(drain=0)
    assert simulated.puts > 0 or rule == "before_eviction"
