"""Copies of corrupt slots, set aside for whoever wants to know what went wrong."""

from contextlib import suppress
from pathlib import Path

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.segment import Place

FILES_KEPT = 16


class Quarantine:
    """A directory of at most `FILES_KEPT` files; the first ones stay, as they show the cause."""

    def __init__(self, directory: Path) -> None:
        """Use a directory that exists."""
        self._directory = directory

    def keep(self, key: PageKey, place: Place, content: memoryview) -> Path | None:
        """Write down what lay in a slot; None if there are enough copies, or none can be made."""
        name = f"{key.namespace.hex()}-{key.hash.hex()}-{place.segment.number}-{place.slot}.slot"
        path = self._directory / name
        try:
            if sum(1 for _ in self._directory.iterdir()) >= FILES_KEPT:
                return None
            path.touch(mode=0o600)
            path.write_bytes(content)
        except OSError:
            with suppress(OSError):  # a file system that is read-only refuses this, too
                path.unlink()
            return None
        return path
