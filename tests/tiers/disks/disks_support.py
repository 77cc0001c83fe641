"""Several NVMe directories for tests: open a tier over them, break disks, and simulate kills."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from memkv_sglang.config.schema import MIB, NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.disks import StripedTier
from memkv_sglang.tiers.nvme import NvmeTier


class Disks:
    """Directories with their settings, and an open `tier` over them."""

    def __init__(self, home: Path, count: int, **settings: Any) -> None:
        self.paths = [home / f"disk{i}" for i in range(count)]
        values = {"capacity": 32 * MIB, "high_watermark": 1.0, "low_watermark": 1.0, **settings}
        self.config = NvmeConfig(directory=",".join(map(str, self.paths)), **values)
        self.tier = StripedTier(self.config)

    def open(self, paths: Sequence[Path] | None = None) -> StripedTier:
        """Open the tier after a close, perhaps over other directories."""
        self.paths = list(paths or self.paths)
        directory = ",".join(map(str, self.paths))
        self.config = msgspec.structs.replace(self.config, directory=directory)
        self.tier = StripedTier(self.config)
        return self.tier

    def reopen(self, paths: Sequence[Path] | None = None) -> StripedTier:
        self.tier.close()
        return self.open(paths)

    def on(self, number: int) -> NvmeTier:
        """Return the open directory of a disk."""
        tier = self.tier._disks[number].tier
        assert tier is not None
        return tier

    def held(self, number: int, keys: Sequence[PageKey]) -> list[PageKey]:
        """Return which of the pages a disk holds."""
        held = self.on(number).present(keys, 0)
        return [key for key, is_held in zip(keys, held, strict=True) if is_held]

    def kill(self) -> None:
        """Leave the directories in the state that a kill of the process would leave now."""
        for number in range(len(self.paths)):
            self.on(number)._housekeeper.close()  # so that it does not change the files
        moved = [path.with_name(path.name + ".before") for path in self.paths]
        for path, copy in zip(self.paths, moved, strict=True):
            shutil.copytree(path, copy)
        self.tier.close()
        for path, copy in zip(self.paths, moved, strict=True):
            shutil.rmtree(path)
            copy.rename(path)


@contextmanager
def open_disks(home: Path, count: int, **settings: Any) -> Iterator[Disks]:
    """Open a tier over some directories for a test."""
    opened = Disks(home, count, **settings)
    try:
        yield opened
    finally:
        opened.tier.close()
