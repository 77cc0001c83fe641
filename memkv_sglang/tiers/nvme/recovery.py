"""Restore the catalog of a directory from the journal. Without a journal, use the footers."""

import errno
import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain, starmap
from typing import NamedTuple

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.nvme.catalog import Catalog, NewPage
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.footer import FOOTER_SIZE, Footer, slot_size_of
from memkv_sglang.tiers.nvme.journal import (
    JOURNAL,
    SLOT,
    Frame,
    Journal,
    JournalDamagedError,
    Kind,
    Put,
    read_journal,
    read_puts,
)
from memkv_sglang.tiers.nvme.segment import Place, Segment
from memkv_sglang.tiers.nvme.slots import NO_ENTRY

_SCAN_THREADS = 16
_SCAN_BATCH = 512
"""Number of footers per task, because starting a task costs more than reading one footer."""
_UNRECORDED = 1 << 20
"""Number of ticks to skip at a restart, so that sequence numbers written before a kill are not
reused."""

_UNREADABLE = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG})
"""Errors which mean that the disk has lost the journal. Others may be temporary, so the journal is
kept."""

_log = logging.getLogger(__name__)


def recover(catalog: Catalog, folder: Folder) -> None:
    """Fill an empty catalog, whose segments are open, and set its journal.

    Pages of segments that exist but could not be opened stay in the journal for a later start.
    Raises `OSError` if the journal can neither be resumed nor rewritten.
    """
    try:
        frames, size = read_journal(folder)
    except (JournalDamagedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _UNREADABLE:
            raise
        if catalog.segments.by_number:
            fields = {"path": str(folder.path / JOURNAL), "reason": str(error)}
            _log.warning("journal unusable, scanning footers", extra={"fields": fields})
        scan_footers(catalog)
        catalog.start_journal(folder)
        return
    lost = _Replay(catalog).run(frames)
    catalog.journal = Journal.resume(folder, size)
    if lost:
        _log.warning("pages lost with their segments", extra={"fields": {"pages": len(lost)}})
        # Otherwise, these pages would seem to be in a later segment of the same number. If the disk
        # is full, that can happen; the load of such a page detects it.
        with suppress(OSError):
            catalog.journal.append(Kind.FREE, b"".join(starmap(SLOT.pack, lost)))


class _Replay:
    """Applies a journal's frames to a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._segments = catalog.segments.by_number
        self._absent = catalog.absent
        self._unopened = catalog.segments.unopened
        self._lost: set[tuple[int, int]] = set()

    def run(self, frames: Iterable[Frame]) -> set[tuple[int, int]]:
        """Apply the frames; return segment and slot of the lost pages."""
        for kind, payload in frames:
            if kind == Kind.PUT:
                self._put(payload)
            elif kind == Kind.FREE:
                self._free(payload)
            elif kind in (Kind.PENDING, Kind.UPLOADED):
                self._mark(payload, pending=kind == Kind.PENDING)
        self._catalog.order.advance_past(self._catalog.order.newest_tick() + _UNRECORDED)
        return self._lost

    def _put(self, payload: bytes) -> None:
        catalog, segments = self._catalog, self._segments
        sizes = lru_cache(slot_size_of)
        for key, number, slot, length, tick in read_puts(payload):
            segment = segments.get(number)
            if segment is None and number in self._unopened:
                self._absent.put(Put(key, number, slot, length, tick))
                continue
            if (
                segment is None
                or slot >= segment.intact_slots
                or sizes(length) != segment.slot_size
            ):
                self._lost.add((number, slot))
                continue
            if (occupant := segment.slots.entries[slot]) != NO_ENTRY:
                catalog.forget(occupant)
            if (elsewhere := catalog.index.find(key)) is not None:
                catalog.forget(elsewhere)
            place = Place(segment, slot)
            catalog.segments.take(place)
            catalog.adopt(NewPage(key, place, length, tick))

    def _free(self, payload: bytes) -> None:
        for number, slot in SLOT.iter_unpack(payload):
            self._lost.discard((number, slot))
            self._absent.free((number, slot))
            entry = self._entry(number, slot)
            if entry != NO_ENTRY:
                self._catalog.forget(entry)

    def _mark(self, payload: bytes, *, pending: bool) -> None:
        for number, slot in SLOT.iter_unpack(payload):
            self._absent.mark((number, slot), pending=pending)
            entry = self._entry(number, slot)
            if entry != NO_ENTRY:
                self._catalog.set_mark(entry, pending=pending)

    def _entry(self, number: int, slot: int) -> int:
        segment = self._segments.get(number)
        if segment is None or slot >= len(segment.slots):
            return NO_ENTRY
        return segment.slots.entries[slot]


class _Found(NamedTuple):
    footer: Footer
    place: Place


def scan_footers(catalog: Catalog) -> None:
    """Fill a catalog from the footers on disk, using several threads.

    Of two footers with the same key, the newer one wins. Pages that were removed but not yet
    overwritten reappear with correct content and their old age. The pending marks are lost, so
    every page is marked, and the upload queue finds out which pages are already uploaded.
    """
    newest: dict[PageKey, _Found] = {}
    for page in read_footers(catalog.segments):
        seen = newest.get(page.footer.key)
        if seen is None or seen.footer.sequence < page.footer.sequence:
            newest[page.footer.key] = page
    for footer, place in sorted(newest.values(), key=lambda page: page.footer.sequence):
        catalog.segments.take(place)
        catalog.adopt(NewPage(footer.key, place, footer.length, footer.sequence))
        catalog.set_mark(place.segment.slots.entries[place.slot], pending=True)
        catalog.order.advance_past(footer.sequence + _UNRECORDED)


def read_footers(segments: Iterable[Segment]) -> Iterator[_Found]:
    """Yield all valid footers with their slots. Skips unreadable ones."""
    batches = [
        (segment, range(first, min(first + _SCAN_BATCH, segment.intact_slots)))
        for segment in segments
        for first in range(0, segment.intact_slots, _SCAN_BATCH)
    ]
    stopping = threading.Event()
    threads = ThreadPoolExecutor(_SCAN_THREADS, thread_name_prefix="memkv-scan")
    try:
        yield from chain.from_iterable(threads.map(partial(_read_batch, stopping), batches))
    finally:
        stopping.set()
        threads.shutdown(cancel_futures=True)


def _read_batch(stopping: threading.Event, batch: tuple[Segment, range]) -> list[_Found]:
    segment, slots = batch
    block = aligned_memory(FOOTER_SIZE)
    found: list[_Found] = []
    for slot in slots:
        if stopping.is_set():
            return found
        try:
            segment.read_footer(block, slot).execute()
        except (OSError, EOFError):
            continue
        footer = Footer.unpack(block)
        if footer is not None and slot_size_of(footer.length) == segment.slot_size:
            found.append(_Found(footer, Place(segment, slot)))
    return found
