"""Copies of corrupt slots, set aside for whoever wants to know what went wrong."""

from pathlib import Path

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory
from memkv_sglang.tiers.nvme.segment import Place

FILES_KEPT = 16


class Quarantine:
    """A directory of at most `FILES_KEPT` files; the first ones stay, as they show the cause."""

    def __init__(self, directory: Path) -> None:
        """Use a directory that exists."""
        self._directory = directory

    def keep(self, key: PageKey, place: Place) -> Path | None:
        """Copy a slot, footer included; None if there are enough copies, or it cannot be read."""
        name = f"{key.namespace.hex()}-{key.hash.hex()}-{place.segment.number}-{place.slot}.slot"
        path = self._directory / name
        content = aligned_memory(place.segment.slot_size)
        try:
            if sum(1 for _ in self._directory.iterdir()) >= FILES_KEPT:
                return None
            place.segment.read([content], place.slot).carry_out()
            path.touch(mode=0o600)
            path.write_bytes(content)
        except (OSError, EOFError):
            path.unlink(missing_ok=True)
            return None
        return path
