"""Verify every page on disk against its checksum, and the index against the disk."""

import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.catalog import Catalog, SlotDescription
from memkv_sglang.tiers.nvme.descriptions import Descriptions
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor, IoTask
from memkv_sglang.tiers.nvme.disk.scratch import Scratch
from memkv_sglang.tiers.nvme.integrity import disagreements
from memkv_sglang.tiers.nvme.load import Loader
from memkv_sglang.tiers.nvme.transfer import holds_page

_BATCH = 8
"""Number of pages that are pinned at the same time, for each request in flight."""


class VerifyReport(NamedTuple):
    """The results of `NvmeTier.verify`."""

    pages: int
    """Pages read."""
    read_bytes: int
    """Bytes of content that were read."""
    corrupt: list[SlotDescription]
    """Pages whose slot does not match the index or its own checksum."""
    unreadable: list[SlotDescription]
    """Pages that the disk failed to read."""
    orphans: list[str]
    """Unknown or damaged files in the segments directory, which take up space."""
    disagreements: list[str]
    """The result of `Tier.check_integrity`."""
    undescribed: list[bytes]
    """Namespaces that have pages but no description."""
    repaired: int
    """Pages removed because they were corrupt or unreadable."""

    @property
    def is_clean(self) -> bool:
        """Whether every page can be loaded and all data structures agree."""
        return not (self.corrupt or self.unreadable or self.disagreements)


class _State(enum.Enum):
    INTACT = enum.auto()
    CORRUPT = enum.auto()
    UNREADABLE = enum.auto()


class _Checked(NamedTuple):
    key: PageKey
    length: int
    state: _State
    place: SlotDescription | None
    """The damage; None if the page is intact, or was removed while it was read."""


class Verifier:
    """Reads and verifies all pages."""

    def __init__(
        self, catalog: Catalog, executor: IoExecutor, loader: Loader, descriptions: Descriptions
    ) -> None:
        """Read through `executor`. The `loader` quarantines bad pages."""
        self._catalog = catalog
        self._executor = executor
        self._loader = loader
        self._descriptions = descriptions

    def verify(self, *, repair: bool, progress: Callable[[int, int], None]) -> VerifyReport:
        """Read and verify every page that is not removed meanwhile.

        With `repair`, quarantines and removes corrupt and unreadable pages. Calls `progress` with
        the number of pages done and the total. Raises `OSError`.
        """
        index = self._catalog.index
        keys = [key for entry in list(index) if (key := index.key(entry)) is not None]
        step = self._executor.depth * _BATCH
        pages = read_bytes = repaired = 0
        bad: dict[_State, list[SlotDescription]] = {_State.CORRUPT: [], _State.UNREADABLE: []}
        for first in range(0, len(keys), step):
            for page in self._check(keys[first : first + step], repair=repair):
                pages += 1
                read_bytes += page.length
                if page.place is not None:
                    bad[page.state].append(page.place)
                    repaired += index.find(page.key) is None
            progress(min(first + step, len(keys)), len(keys))
        described = self._descriptions.read_all()
        return VerifyReport(
            pages=pages,
            read_bytes=read_bytes,
            corrupt=bad[_State.CORRUPT],
            unreadable=bad[_State.UNREADABLE],
            orphans=self._catalog.segments.orphans(),
            disagreements=disagreements(self._catalog),
            undescribed=[n for n in index.namespaces() if n not in described],
            repaired=repaired,
        )

    def _check(self, keys: Sequence[PageKey], *, repair: bool) -> list[_Checked]:
        pinned = self._catalog.pin(keys)
        try:
            present = [(k, e) for k, e in zip(keys, pinned, strict=True) if e is not None]
            checked = self._executor.run(self._check_page(key, entry) for key, entry in present)
            for (key, entry), page in zip(present, checked, strict=True):
                if repair and page.state is not _State.INTACT:
                    self._loader.quarantine_page(key, entry)
        finally:
            self._catalog.unpin(pinned)
        return checked

    def _check_page(self, key: PageKey, entry: int) -> IoTask[_Checked]:
        length = self._catalog.index.lengths[entry]
        with self._executor.scratches.borrow() as scratch:
            state = yield from self._state(key, entry, scratch)
        place = None if state is _State.INTACT else self._catalog.describe(key)
        return _Checked(key, length, state, place)

    def _state(self, key: PageKey, entry: int, scratch: Scratch) -> IoTask[_State]:
        segment, slot = self._catalog.place(entry)
        length = self._catalog.index.lengths[entry]
        content = scratch.bounce(segment.slot_size)
        try:
            yield segment.read([content], slot)
        except OSError:
            return _State.UNREADABLE
        except EOFError:
            return _State.CORRUPT
        return _State.INTACT if holds_page(content, key, length) else _State.CORRUPT
