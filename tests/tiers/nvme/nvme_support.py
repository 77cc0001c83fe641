"""An NVMe directory of a test: opens tiers on it, damages it, and shows how a kill leaves it."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme import NvmeTier, SlotDescription
from memkv_sglang.tiers.nvme.budget import JOURNAL_BYTES_PER_SLOT, divide

SLOT = 12 * 1024
"""Bytes on disk of a page in two buffers of a block each: the suite's usual one."""


class Disk:
    """A directory with its settings; `tier` is open until `close`."""

    def __init__(self, path: Path, **settings: Any) -> None:
        values = {
            "capacity": 32 * MIB,
            "high_watermark": 1.0,
            "low_watermark": 1.0,
            "io_engine": "threads",  # their system calls are what tests let fail
            **settings,
        }
        self.config = NvmeConfig(directory=str(path), **values)
        self.tier = NvmeTier(self.config)

    @property
    def path(self) -> Path:
        return Path(self.config.directory)

    @property
    def journal(self) -> Path:
        return self.path / "journal"

    def segments(self) -> list[Path]:
        return sorted((self.path / "segments").glob("*.seg"))

    def quarantined(self) -> list[Path]:
        return sorted((self.path / "quarantine").iterdir())

    def find(self, key: PageKey) -> SlotDescription:
        found = self.tier._catalog.describe(key)
        assert found is not None
        return found

    def reopen(self, **settings: Any) -> NvmeTier:
        """Close and open again, perhaps with other settings."""
        self.tier.close()
        return self.open(**settings)

    def open(self, **settings: Any) -> NvmeTier:
        """Open after a close."""
        self.config = msgspec.structs.replace(self.config, **settings)
        self.tier = NvmeTier(self.config)
        return self.tier

    def kill(self) -> None:
        """Leave the directory as a kill of the process at this moment would."""
        self.tier._housekeeper.close()  # or it would change what is being copied
        moved = self.path.with_name(self.path.name + ".before")
        shutil.copytree(self.path, moved)
        self.tier.close()
        shutil.rmtree(self.path)
        moved.rename(self.path)

    def flip(self, key: PageKey, offset: int = 0) -> None:
        """Change a bit of a stored page, `offset` bytes into its slot."""
        place = self.find(key)
        path = self.path / "segments" / f"{place.segment:08d}.seg"
        with path.open("r+b") as file:
            file.seek(place.offset + offset)
            byte = file.read(1)[0]
            file.seek(place.offset + offset)
            file.write(bytes([byte ^ 1]))

    def close(self) -> None:
        self.tier.close()


@contextmanager
def disk(path: Path, **settings: Any) -> Iterator[Disk]:
    """Open a directory for a test."""
    opened = Disk(path, **settings)
    try:
        yield opened
    finally:
        opened.close()


def room_for(pages: int, slot_size: int = SLOT, *, segments: int = 16) -> int:
    """Return a capacity that holds exactly so many pages of one slot size."""
    assert pages % segments == 0
    needed = segments * (4096 + pages // segments * (slot_size + JOURNAL_BYTES_PER_SLOT))
    capacity = needed
    while (missing := needed - divide(capacity).segments) > 0:
        capacity += missing
    return capacity


def present(tier: NvmeTier, keys: Sequence[PageKey]) -> list[bool]:
    return tier.present(keys, 0)
