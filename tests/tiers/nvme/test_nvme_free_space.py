"""A disk shared with other programs: the tier leaves the configured space free."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.testing.pages import make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme import tier as nvme_tier

PAGE = 64 << 10
SPACE = 32 * MIB
KEEP = 8 * MIB
LIMIT = 30.0


class SharedDisk:
    """Simulates, in `statvfs`, a file system of `SPACE` bytes that others fill.

    A real one would have to be mounted. The sizes of the tier's own files are real.
    """

    def __init__(self, directory: Path) -> None:
        self.taken_by_others = 0
        self._directory = directory

    @property
    def free(self) -> int:
        own = sum(path.stat().st_size for path in self._directory.rglob("*.seg"))
        return SPACE - self.taken_by_others - own

    def statvfs(self, _: object) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=max(self.free, 0), f_frsize=1, f_blocks=1 << 40, f_flag=0)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedDisk:
    shared = SharedDisk(tmp_path)
    real = os.statvfs
    monkeypatch.setattr(
        os, "statvfs", lambda p: shared.statvfs(p) if "pages" in str(p) else real(p)
    )
    monkeypatch.setattr(os, "fstatvfs", shared.statvfs)
    monkeypatch.setattr(nvme_tier, "_CHECK_INTERVAL", 0.05)
    return shared


@pytest.fixture
def tier(disk: SharedDisk, tmp_path: Path) -> Iterator[NvmeTier]:
    config = NvmeConfig(
        directory=str(tmp_path / "pages"), capacity=64 * MIB, segment_size=2 * MIB, keep_free=KEEP
    )
    tier = NvmeTier(config)
    yield tier
    tier.close()


def spill(tier: NvmeTier, seed: str, count: int) -> list[SpillResult]:
    chain = make_chain(make_namespace(PAGE), count, seed)
    pages = [make_page(key, [PAGE], filled=True) for key in chain.keys()]
    return tier.spill(pages, time.monotonic() + LIMIT)


def test_spills_leave_the_configured_space_free(tier: NvmeTier, disk: SharedDisk) -> None:
    for i in range(8):  # spills twice the space available
        assert set(spill(tier, str(i), 100)) == {SpillResult.STORED}
        assert disk.free >= KEEP
    assert tier.usage().evicted > 0
    assert tier.check_integrity() == []


def test_tier_shrinks_when_others_fill_the_disk(tier: NvmeTier, disk: SharedDisk) -> None:
    spill(tier, "chain", 300)
    held = tier.usage().pages
    disk.taken_by_others = 12 * MIB
    give_up = time.monotonic() + LIMIT
    while disk.free < KEEP:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    assert 0 < tier.usage().pages < held
    assert set(spill(tier, "more", 20)) == {SpillResult.STORED}
    assert disk.free >= KEEP
    assert tier.check_integrity() == []


def test_spills_are_refused_without_free_space(tier: NvmeTier, disk: SharedDisk) -> None:
    disk.taken_by_others = SPACE
    assert set(spill(tier, "chain", 4)) <= {SpillResult.REFUSED, SpillResult.FAILED}
    disk.taken_by_others = 0
    give_up = time.monotonic() + LIMIT
    while set(spill(tier, "chain", 4)) != {SpillResult.STORED}:
        assert time.monotonic() < give_up
        time.sleep(0.05)
