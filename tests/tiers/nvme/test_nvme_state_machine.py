"""Compare random histories of the NVMe tier, with kills and bit flips, with a model."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from memkv_sglang.config.schema import MIB
from memkv_sglang.testing.conformance import soon
from memkv_sglang.testing.pages import make_page
from memkv_sglang.testing.state_machine import PREFIXES, SHAPES, Prefix, TierMachine
from memkv_sglang.tiers.base import LoadResult, Tier
from tests.tiers.nvme.nvme_support import SLOT, Disk, present


class NvmeMachine(TierMachine):
    capacity = 16 * MIB

    def open(self) -> Tier:
        self.directory = tempfile.TemporaryDirectory()
        self.disk = Disk(
            Path(self.directory.name, "nvme"),
            capacity=self.capacity,
            high_watermark=0.95,
            low_watermark=0.9,
            queue_depth=2,
            io_engine="aio",
        )
        self.pending_uploads = self.disk.tier
        return self.disk.tier

    def reopen(self, tier: Tier, *, cleanly: bool) -> Tier:
        if cleanly:
            self.pending_uploads = self.disk.reopen()
        else:
            self.disk.kill()
            self.pending_uploads = self.disk.open()
        return self.pending_uploads

    @rule(where=PREFIXES, part=st.integers(0, 10**9))
    def flip_a_bit(self, where: Prefix, part: int) -> None:
        """Flip a bit of content or footer: the first load is corrupt, the second a miss."""
        keys = self._chain(where).keys()[-1:]
        for key in keys:
            if not present(self.disk.tier, [key])[0]:
                continue
            self.disk.flip(key, self._damaged_byte(sum(SHAPES[where.shape]), part))
            page = make_page(key, SHAPES[where.shape], filled=False)
            assert self.tier.load([page], soon()) == [LoadResult.CORRUPT]
            assert self.tier.load([page], soon()) == [LoadResult.MISSING]
            self.stored.discard(key)
            self.pending.discard(key)

    @staticmethod
    def _damaged_byte(length: int, part: int) -> int:
        """Return an offset in the content or in the footer's fields, not in the padding."""
        footer = -(-length // 4096) * 4096
        offset = part % (length + 100)
        return offset if offset < length else footer + offset - length

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "directory"):
            self.directory.cleanup()


class CrowdedMachine(NvmeMachine):
    evicts = True
    capacity = 20 * SLOT


TestRoomy = NvmeMachine.TestCase
TestCrowded = CrowdedMachine.TestCase
TestRoomy.settings = TestCrowded.settings = settings(max_examples=30, stateful_step_count=30)
