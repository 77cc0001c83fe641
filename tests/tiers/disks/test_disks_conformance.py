"""The tier over several directories passes the conformance tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import TierConformance
from memkv_sglang.testing.pages import BLOCK
from memkv_sglang.tiers.base import Tier
from memkv_sglang.tiers.disks import StripedTier
from tests.tiers.nvme.test_nvme_conformance import pages_in


@pytest.mark.parametrize("disks", [2, pytest.param(3, marks=pytest.mark.slow)])
class TestStripedTier(TierConformance):
    page_overhead = 2 * BLOCK  # the page's padding and its footer

    @pytest.fixture
    def tier(self, tmp_path: Path, disks: int) -> Iterator[Tier]:
        self.directories = [tmp_path / f"disk {i}" for i in range(disks)]
        self.config = NvmeConfig(directory=",".join(map(str, self.directories)), capacity=32 * MIB)
        self.opened = [StripedTier(self.config)]
        yield self.opened[0]
        for tier in self.opened:
            tier.close()

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        self.opened.append(StripedTier(self.config))
        return self.opened[-1]

    def stored_keys(self, tier: Tier) -> set[PageKey]:
        return set(self._places())

    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        path, offset, length = self._places()[key]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        path, offset, _ = self._places()[key]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def _places(self) -> dict[PageKey, tuple[Path, int, int]]:
        """Return the file, offset and length of every page, each of which is on one disk only."""
        places: dict[PageKey, tuple[Path, int, int]] = {}
        for directory in self.directories:
            found = pages_in(directory)
            assert not places.keys() & found.keys()
            places |= found
        return places
