"""The NVMe tier passes the conformance tests, with both I/O engines."""

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.testing.conformance import TierConformance
from memkv_sglang.testing.pages import BLOCK
from memkv_sglang.tiers.base import Tier
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.journal import SLOT, Kind, read_journal, read_puts


@pytest.mark.parametrize("io_engine", ["aio", "threads"])
class TestNvmeTier(TierConformance):
    page_overhead = 2 * BLOCK  # the page's padding and its footer

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

    def stored_keys(self, tier: Tier) -> set[PageKey]:
        return set(pages_in(Path(self.config.directory)))

    def read_stored(self, tier: Tier, key: PageKey) -> bytes:
        path, offset, length = pages_in(Path(self.config.directory))[key]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def write_stored(self, tier: Tier, key: PageKey, content: bytes) -> None:
        path, offset, _ = pages_in(Path(self.config.directory))[key]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)


def pages_in(directory: Path) -> dict[PageKey, tuple[Path, int, int]]:
    """Return the file, offset and length of every page according to the journal file."""
    with closing(Folder.at(directory)) as folder:
        frames, _ = read_journal(folder)
    slots: dict[tuple[int, int], tuple[PageKey, int]] = {}
    for kind, payload in frames:
        if kind == Kind.PUT:
            for key, segment, slot, length, _ in read_puts(payload):
                slots[segment, slot] = (key, length)
        elif kind == Kind.FREE:
            for freed in SLOT.iter_unpack(payload):
                del slots[freed]
    return {
        key: (*_locate(directory, segment, slot), length)
        for (segment, slot), (key, length) in slots.items()
    }


def _locate(directory: Path, segment: int, slot: int) -> tuple[Path, int]:
    path = directory / "segments" / f"{segment:08d}.seg"
    with path.open("rb") as file:
        (slot_size,) = struct.unpack_from("<Q", file.read(BLOCK), 16)
    return path, BLOCK + slot * slot_size
