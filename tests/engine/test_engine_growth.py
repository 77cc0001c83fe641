"""Conversations grow in SGLang's memory; no page on disk outlives its predecessors.

The guarantee: a page stored after its parent is never on disk without it, whatever is evicted in
between. Removals (`clear`, corrupt pages), pages that wait for upload, and loads without a lookup
may leave holes.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import EngineConfig, NvmeConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.testing.pages import make_chain, make_hashes
from memkv_sglang.tiers.base import SpillResult, Tier
from memkv_sglang.tiers.memory import MemoryTier
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.wrappers import WrapperTier
from tests.engine.engines import NAMESPACE, put, spill
from tests.tiers.nvme.nvme_support import capacity_for

CONVERSATIONS, LONGEST, TURN, ROOM = 5, 20, 5, 48
"""All conversations together have more pages than the tier has room for; one of them, with a turn
of another, fits."""

WHICH = st.integers(0, CONVERSATIONS - 1)


class Growing(RuleBasedStateMachine):
    """Turns are spilled one by one; like SGLang, it looks up only the pages it has lost."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.tier = NvmeTier(
            NvmeConfig(
                directory=str(Path(self.directory.name, "nvme")),
                capacity=capacity_for(ROOM),
                high_watermark=1.0,
                low_watermark=1.0,
            )
        )
        metrics = Metrics(CollectorRegistry())
        self.engine = Engine(self.tier, None, None, EngineConfig(), metrics)
        common = make_hashes(4, "system prompt")
        self.chains = [
            Chain(NAMESPACE.digest, [*common, *make_hashes(LONGEST - 4, str(i), common[-1])])
            for i in range(CONVERSATIONS)
        ]
        self.held = [0] * CONVERSATIONS
        """Pages of each conversation that SGLang has and has spilled."""

    @rule(which=WHICH, pages=st.integers(1, TURN))
    def grow(self, which: int, pages: int) -> None:
        chain = self.chains[which]
        if not all(self.tier.present(chain.keys()[: self.held[which]], 0)):
            self.come_back(which)  # pages after a missing one are of no use
        held = self.held[which]
        keys = chain.keys()[held : held + pages]
        results = spill(self.engine, keys, chain.hashes[:held])
        assert set(results) <= {SpillResult.STORED, SpillResult.PRESENT}
        self.held[which] += len(keys)

    @rule(which=WHICH)
    def come_back(self, which: int) -> None:
        """Continue with the stored prefix, after SGLang has lost its own pages."""
        self.held[which] = self.engine.lookup(self.chains[which]).length

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def no_page_outlives_one_before_it(self) -> None:
        for chain in self.chains:
            there = self.tier.present(chain.keys(), 0)
            assert not any(there[there.index(False) :] if False in there else ())

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close(drain=0)
            self.directory.cleanup()


class LosingTier(WrapperTier):
    """Evicts a page before or after the next spill writes its pages."""

    def __init__(self, inner: Tier, victim: PageKey, *, before: bool) -> None:
        super().__init__(inner)
        self._victim = victim
        self._before = before

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        if self._before:
            self.inner.remove([self._victim])
        results = self.inner.spill(pages, deadline)
        self.inner.remove([self._victim])
        return results


@pytest.mark.parametrize("before", [True, False])
def test_pages_after_one_evicted_meanwhile_are_refused(before: bool) -> None:
    chain = make_chain(NAMESPACE, 6, "chain")
    memory = MemoryTier(name="local")
    put(memory, chain.keys()[:4])
    tier = LosingTier(memory, chain.keys()[3], before=before)
    engine = Engine(tier, None, None, EngineConfig(), Metrics(CollectorRegistry()))
    results = spill(engine, chain.keys()[4:], chain.hashes[:4])
    assert results == [SpillResult.REFUSED] * 2
    assert memory.present(chain.keys(), 0) == [True] * 3 + [False] * 3
    assert spill(engine, chain.keys()[4:], chain.hashes[:4]) == [SpillResult.REFUSED] * 2
    engine.close(drain=0)


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(
    max_examples=25, stateful_step_count=40, derandomize=True, deadline=None
)
