"""Every page on disk against its checksum, and the index against the disk."""

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
"""Pages a request in flight that are pinned at a time."""


class VerifyReport(NamedTuple):
    """What `NvmeTier.verify` found."""

    pages: int
    """Pages read."""
    read_bytes: int
    """Their content."""
    corrupt: list[SlotDescription]
    """Pages whose slot disagrees with the index or with its own checksum."""
    unreadable: list[SlotDescription]
    """Pages that the disk would not give back."""
    orphans: list[str]
    """Files among the segments that are none, or are damaged: they take space and serve nothing."""
    disagreements: list[str]
    """As `Tier.check_integrity` has it."""
    undescribed: list[bytes]
    """Namespaces that have pages but no description."""
    repaired: int
    """Pages that were freed because they were corrupt or unreadable."""

    @property
    def is_clean(self) -> bool:
        """Tell whether every page can be loaded and all structures agree."""
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
    """None if the page is intact, or was dropped while it was read."""


class Verifier:
    """Reads everything. See `verify`."""

    def __init__(
        self, catalog: Catalog, executor: IoExecutor, loader: Loader, descriptions: Descriptions
    ) -> None:
        """Read with `executor`; `loader` sets bad pages aside as it does on a load."""
        self._catalog = catalog
        self._executor = executor
        self._loader = loader
        self._descriptions = descriptions

    def verify(self, *, repair: bool, progress: Callable[[int, int], None]) -> VerifyReport:
        """Read every page there is at the call; pages that leave meanwhile are left out.

        With `repair` the pages that are not intact are set aside and freed. `progress` is called
        with the pages done and their number altogether. Raises `OSError`.
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
            there = [(k, e) for k, e in zip(keys, pinned, strict=True) if e is not None]
            checked = self._executor.run(self._check_page(key, entry) for key, entry in there)
            for (key, entry), page in zip(there, checked, strict=True):
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
