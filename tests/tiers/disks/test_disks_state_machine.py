"""Compare random histories of several disks, with kills and lost directories, with a model."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from memkv_sglang.config.schema import MIB
from memkv_sglang.testing.conformance import soon
from memkv_sglang.testing.pages import make_page
from memkv_sglang.testing.state_machine import SHAPES, TierMachine
from memkv_sglang.tiers.base import SpillResult, Tier
from tests.tiers.disks.disks_support import Disks
from tests.tiers.nvme.nvme_support import SLOT

DISKS = 3


class DisksMachine(TierMachine):
    capacity = 16 * MIB

    def open(self) -> Tier:
        self.directory = tempfile.TemporaryDirectory()
        self.disks = Disks(
            Path(self.directory.name),
            DISKS,
            capacity=self.capacity,
            high_watermark=0.95,
            low_watermark=0.9,
            queue_depth=2,
        )
        self.pending_uploads = self.disks.tier
        return self.disks.tier

    def reopen(self, tier: Tier, *, cleanly: bool) -> Tier:
        if cleanly:
            self.pending_uploads = self.disks.reopen()
        else:
            self.disks.kill()
            self.pending_uploads = self.disks.open()
        return self.pending_uploads

    @rule(number=st.integers(0, DISKS - 1))
    def replace_a_disk(self, number: int) -> None:
        """Lose the pages of one disk, and no others."""
        lost = set(self.disks.held(number, sorted(self.stored)))
        self.tier.close()
        shutil.rmtree(self.disks.paths[number])
        self.tier = self.pending_uploads = self.disks.open()
        self.stored -= lost
        self.pending -= lost

    @rule(number=st.integers(0, DISKS - 1), pending=st.booleans())
    def return_a_disk(self, number: int, pending: bool) -> None:
        """Open without a disk, spill half of its pages again, and open with it."""
        held = self.disks.held(number, sorted(self.stored))
        paths = self.disks.paths
        self.tier = self.disks.reopen([*paths[:number], *paths[number + 1 :]])
        assert not any(self.tier.present(held, soon()))
        for key in held[::2]:
            shape = next(
                shape
                for shape, namespace in zip(SHAPES, self.namespaces, strict=True)
                if namespace.digest == key.namespace
            )
            page = make_page(key, shape, filled=True)
            stored = self.tier.spill([page], soon()) == [SpillResult.STORED]
            assert stored or self.evicts
            if stored and pending:
                self.pending.update([key] * self.disks.tier.mark_pending([key]))
        self.tier = self.pending_uploads = self.disks.reopen(paths)
        assert self.evicts or all(self.tier.present(held, soon()))
        assert self.evicts or self.tier.usage().pages == len(self.stored)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "directory"):
            self.directory.cleanup()


class CrowdedMachine(DisksMachine):
    evicts = True
    capacity = 8 * SLOT


TestRoomy = DisksMachine.TestCase
TestCrowded = pytest.mark.slow(CrowdedMachine.TestCase)
TestRoomy.settings = settings(max_examples=8, stateful_step_count=20)
TestCrowded.settings = settings(max_examples=30, stateful_step_count=30)
