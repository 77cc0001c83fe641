"""Pages in segments that could not be opened, but may be opened by a later start."""

from collections.abc import Iterable, Iterator

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.journal import Put

_Slot = tuple[int, int]
"""A page's segment and slot."""


class AbsentPages:
    """The journal's records of these pages. The caller must hold the catalog's locks."""

    def __init__(self) -> None:
        """Create an empty collection."""
        self.pending: dict[_Slot, None] = {}
        """Slots whose pages are pending upload, oldest mark first."""
        self._puts: dict[_Slot, Put] = {}
        self._slots: dict[PageKey, _Slot] = {}

    def __len__(self) -> int:
        return len(self._puts)

    def __iter__(self) -> Iterator[Put]:
        return iter(self._puts.values())

    def put(self, page: Put) -> None:
        """Add a page, replacing any other page in its slot and any other copy of it."""
        slot = (page.segment, page.slot)
        self.free(slot)
        if (elsewhere := self._slots.get(page.key)) is not None:
            self.free(elsewhere)
        self._puts[slot] = page
        self._slots[page.key] = slot

    def free(self, slot: _Slot) -> None:
        """Remove the page in a slot, if any."""
        if (page := self._puts.pop(slot, None)) is not None:
            del self._slots[page.key]
            self.pending.pop(slot, None)

    def mark(self, slot: _Slot, *, pending: bool) -> None:
        """Set or clear the pending mark of the page in a slot, if any."""
        if slot not in self._puts:
            return
        if pending:
            self.pending[slot] = None
        else:
            self.pending.pop(slot, None)

    def find(self, keys: Iterable[PageKey]) -> list[_Slot]:
        """Return the slots of those pages that are in such segments."""
        if not self._puts:
            return []
        return [self._slots[key] for key in keys if key in self._slots]

    def of_namespace(self, namespace: bytes) -> list[PageKey]:
        """Return the pages of a namespace that are in such segments."""
        return [key for key in self._slots if key.namespace == namespace]
