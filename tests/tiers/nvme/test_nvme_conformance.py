"""The NVMe tier passes the suite that all tiers pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import TierConformance
from memkv_sglang.tiers.base import Tier
from memkv_sglang.tiers.nvme import NvmeTier


@pytest.mark.parametrize("io_engine", ["aio", "threads"])
class TestNvmeTier(TierConformance):
    @pytest.fixture
    def tier(self, tmp_path: Path, io_engine: Literal["aio", "threads"]) -> Iterator[Tier]:
        self.config = NvmeConfig(
            directory=str(tmp_path / "nvme"), capacity=32 * MIB, io_engine=io_engine
        )
        self.opened: list[NvmeTier] = [NvmeTier(self.config)]
        yield self.opened[0]
        for tier in self.opened:
            tier.close()

    def reopen(self, tier: Tier) -> Tier:
        tier.close()
        self.opened.append(NvmeTier(self.config))
        return self.opened[-1]

    def corrupt(self, tier: Tier, key: PageKey) -> None:
        assert isinstance(tier, NvmeTier)
        found = tier._catalog.describe(key)
        assert found is not None
        path = Path(self.config.directory, "segments", f"{found.segment:08d}.seg")
        with path.open("r+b") as file:
            file.seek(found.offset + found.length // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
