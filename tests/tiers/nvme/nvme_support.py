"""An NVMe directory for tests: open tiers on it, damage it, and simulate kills."""

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
"""Bytes on disk of the default test page, which has two buffers of one block each."""


class Disk:
    """A directory with its settings and an open `tier`."""

    def __init__(self, path: Path, **settings: Any) -> None:
        values = {
            "capacity": 32 * MIB,
            "high_watermark": 1.0,
            "low_watermark": 1.0,
            "io_engine": "threads",  # so that tests can make their system calls fail
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
        """Close the tier and open it again, optionally with changed settings."""
        self.tier.close()
        return self.open(**settings)

    def open(self, **settings: Any) -> NvmeTier:
        """Open the tier after a close."""
        self.config = msgspec.structs.replace(self.config, **settings)
        self.tier = NvmeTier(self.config)
        return self.tier

    def kill(self) -> None:
        """Leave the directory in the state that a kill of the process would leave now."""
        self.tier._housekeeper.close()  # so that it does not change the files being copied
        moved = self.path.with_name(self.path.name + ".before")
        shutil.copytree(self.path, moved)
        self.tier.close()
        shutil.rmtree(self.path)
        moved.rename(self.path)

    def flip(self, key: PageKey, offset: int = 0) -> None:
        """Flip a bit of a stored page, `offset` bytes into its slot."""
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


def capacity_for(pages: int, slot_size: int = SLOT, *, segments: int = 16) -> int:
    """Return a capacity for exactly this many pages of one slot size."""
    assert pages % segments == 0
    needed = segments * (4096 + pages // segments * (slot_size + JOURNAL_BYTES_PER_SLOT))
    capacity = needed
    while (missing := needed - divide(capacity).segments) > 0:
        capacity += missing
    return capacity


def present(tier: NvmeTier, keys: Sequence[PageKey]) -> list[bool]:
    return tier.present(keys, 0)
