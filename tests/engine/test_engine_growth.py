"""Growing conversations: no page on disk outlives an earlier one."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry

from memkv_sglang.config.schema import EngineConfig, NvmeConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_hashes
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from tests.engine.engines import NAMESPACE, spill
from tests.tiers.nvme.nvme_support import room_for

CONVERSATIONS, LONGEST, TURN, ROOM = 5, 20, 5, 48
"""All of them together have more pages than there is room for; one and a turn have not."""

WHICH = st.integers(0, CONVERSATIONS - 1)


class Growing(RuleBasedStateMachine):
    """Turns are spilled one by one, as SGLang does: it looks up what it has lost, and no more."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.tier = NvmeTier(
            NvmeConfig(
                directory=str(Path(self.directory.name, "nvme")),
                capacity=room_for(ROOM),
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
        """Pages of each that SGLang has, and has spilled."""

    @rule(which=WHICH, pages=st.integers(1, TURN))
    def grow(self, which: int, pages: int) -> None:
        chain = self.chains[which]
        if not all(self.tier.present(chain.keys()[: self.held[which]], 0)):
            self.come_back(which)  # behind a hole, pages are of no use to anybody
        held = self.held[which]
        keys = chain.keys()[held : held + pages]
        results = spill(self.engine, keys, chain.hashes[:held])
        assert set(results) <= {SpillResult.STORED, SpillResult.PRESENT}
        self.held[which] += len(keys)

    @rule(which=WHICH)
    def come_back(self, which: int) -> None:
        """Go on with what is found, once SGLang has lost its own."""
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


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(max_examples=25, stateful_step_count=40)
