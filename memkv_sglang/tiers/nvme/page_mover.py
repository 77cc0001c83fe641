"""Move pages of a segment to free slots of other segments."""

from collections.abc import Callable, Mapping

from memkv_sglang.tiers.nvme.catalog import Catalog
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory, read_fully, write_fully
from memkv_sglang.tiers.nvme.faults import FaultLog
from memkv_sglang.tiers.nvme.segment import Place, Segment
from memkv_sglang.tiers.nvme.slots import NO_ENTRY


class PageMover:
    """Moves pages between segments of one slot size. Not thread-safe.

    Calls block on the disk. They raise the `OSError` of a failed write or of the journal.
    """

    def __init__(self, catalog: Catalog, faults: FaultLog) -> None:
        """Report pages that cannot be read to `faults`."""
        self._catalog = catalog
        self._faults = faults
        self._scratch = memoryview(b"")

    def move(
        self, segment: Segment, slots: range, on_moved: Callable[[Mapping[int, int]], None]
    ) -> bool:
        """Move the pages in `slots` to other segments; return False if those lack free slots.

        Drops pages that cannot be read, unless they are pending upload. Calls `on_moved` with a
        map from the old entries of the moved pages to their new ones, while the pages are pinned.
        """
        entries = [segment.slots.entries[slot] for slot in slots]
        keys = [key for e in entries if e != NO_ENTRY and (key := self._catalog.index.key(e))]
        pinned = self._catalog.pin(keys)  # a page may have moved before it was pinned
        places: list[Place] = []
        try:
            pages = [e for e in pinned if e is not None and self._lies_in(segment, e)]
            places += self._catalog.reserve(segment.slot_size, len(pages))
            if len(places) < len(pages):
                return False
            moves = list(zip(pages, places, strict=True))
            unreadable = [entry for entry, place in moves if not self._copy(entry, place)]
            moved = self._catalog.move((e, p) for e, p in moves if e not in unreadable)
            places = [place for entry, place in moves if entry not in moved]
            on_moved(moved)
            self._catalog.drop([e for e in unreadable if e not in self._catalog.pending])
        finally:
            self._catalog.release(places)
            self._catalog.unpin(pinned)
        return True

    def _lies_in(self, segment: Segment, entry: int) -> bool:
        return self._catalog.index.segments[entry] == segment.number

    def _copy(self, entry: int, place: Place) -> bool:
        """Copy a page with its footer, which has the checksum. Return False if unreadable."""
        source = self._catalog.place(entry)
        size = place.segment.slot_size
        if len(self._scratch) < size:
            self._scratch = aligned_memory(size)
        content = [self._scratch[:size]]
        try:
            read_fully(source.segment.fd, content, source.segment.offset(source.slot))
        except (OSError, EOFError) as error:
            self._faults.report("cannot read a page to move it", error=str(error))
            return False
        write_fully(place.segment.fd, content, place.segment.offset(place.slot))
        return True
