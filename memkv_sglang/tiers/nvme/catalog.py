"""Keep index, slots, eviction order, pending marks and journal consistent with each other.

There are two locks. A change holds `changes` until it is in the journal, so that the journal has
all changes in order. `lock` is only held briefly, and never while blocking. Lookups take neither
lock.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import starmap
from typing import NamedTuple

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.tiers.base import PendingPage
from memkv_sglang.tiers.eviction import EvictionOrder, PolicyChooser
from memkv_sglang.tiers.nvme.absent import AbsentPages
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.index import Index
from memkv_sglang.tiers.nvme.journal import PUT, SLOT, Journal, Kind, Put
from memkv_sglang.tiers.nvme.segment import Place
from memkv_sglang.tiers.nvme.segments import Segments

_SNAPSHOT_BATCH = 512
"""Number of entries that a snapshot reads each time it holds the lock, in a fraction of a
millisecond."""


class NewPage(NamedTuple):
    """A page that is on disk but not yet in the catalog."""

    key: PageKey
    place: Place
    length: int
    tick: int


class SlotDescription(NamedTuple):
    """The location and state of a stored page, for `memkv inspect`."""

    key: PageKey
    segment: int
    slot: int
    slot_size: int
    """Bytes on disk, including the footer."""
    offset: int
    """Offset of the slot in the segment file."""
    length: int
    """Bytes of content."""
    pending: bool
    """Whether the page is pending upload."""


class CompactionGivenUpError(Exception):
    """Rewriting the journal was abandoned for lack of time."""


class Catalog:
    """The stored pages. Thread-safe. Changes block on the journal and raise its `OSError`."""

    def __init__(self, segments: Segments, chooser: PolicyChooser | None = None) -> None:
        """Create an empty catalog. Recovery fills it and sets `journal`.

        `chooser` chooses the reuse policy. If it is None, this disk has its own.
        """
        self.journal: Journal
        self.segments = segments
        self.index = Index()
        self.order = EvictionOrder(chooser)
        self.pending: dict[int, None] = {}
        """Entries pending upload, oldest mark first."""
        self.pending_by_segment: Counter[int] = Counter()
        """Number of pending entries by segment number."""
        self.exempt: Collection[PageKey] = frozenset()
        """Pages exempt from eviction, whether or not they are stored."""
        self.absent = AbsentPages()
        """Pages in segments that could not be opened. They stay in the journal."""
        self.changes = threading.RLock()
        self.lock = threading.Lock()
        self._pins: dict[int, int] = {}
        self._released_on_unpin: set[int] = set()

    @property
    def is_partial(self) -> bool:
        """Whether some segments could not be opened. Their pages are in `absent`."""
        return bool(self.segments.unopened)

    # Finding pages

    def walk(self, chain: Chain) -> list[int]:
        """Return the entries of the chain's pages, up to the first missing page."""
        pages = self.index.of_namespace(chain.namespace)
        entries: list[int] = []
        with suppress(KeyError):  # `extend` has appended all pages before the missing one
            entries.extend(map(pages.__getitem__, chain.hashes))
        return entries

    def pin(self, keys: Iterable[PageKey]) -> list[int | None]:
        """Return the pages' entries; None for a missing page.

        Until `unpin`, their slots keep their content, even if the pages are dropped.
        """
        with self.lock:
            entries = [self.index.find(key) for key in keys]
            for entry in entries:
                if entry is not None:
                    self._pins[entry] = self._pins.get(entry, 0) + 1
        return entries

    def unpin(self, entries: Iterable[int | None]) -> None:
        """Unpin the entries that `pin` returned."""
        with self.lock:
            for entry in entries:
                if entry is None:
                    continue
                self._pins[entry] -= 1
                if not self._pins[entry]:
                    del self._pins[entry]
                    if entry in self._released_on_unpin:
                        self._released_on_unpin.remove(entry)
                        self._release(entry)

    def is_pinned(self, entry: int) -> bool:
        """Return whether the entry is pinned; call with `lock` held."""
        return entry in self._pins

    def is_exempt(self, entry: int) -> bool:
        """Return whether the page is exempt from eviction."""
        return bool(self.exempt) and self.index.key(entry) in self.exempt

    def place(self, entry: int) -> Place:
        """Return the slot of an entry. The entry must be pinned, or the caller must hold `lock`."""
        number = self.index.segments[entry]
        return Place(self.segments.by_number[number], self.index.slots[entry])

    def describe(self, key: PageKey) -> SlotDescription | None:
        """Return the location and state of a page; None if it is missing."""
        with self.lock:
            entry = self.index.find(key)
            if entry is None:
                return None
            segment, slot = self.place(entry)
            return SlotDescription(
                key=key,
                segment=segment.number,
                slot=slot,
                slot_size=segment.slot_size,
                offset=segment.offset(slot),
                length=self.index.lengths[entry],
                pending=entry in self.pending,
            )

    # Changing the set of pages

    def reserve(self, slot_size: int, count: int) -> list[Place]:
        """Reserve up to `count` free slots, consecutive ones where possible."""
        with self.lock:
            return self.segments.reserve(slot_size, count)

    def release(self, places: Iterable[Place]) -> None:
        """Free reserved slots that were not published."""
        with self.lock:
            for place in places:
                self.segments.release(place)

    def publish(self, pages: Sequence[NewPage]) -> list[bool]:
        """Add pages to the catalog, in order, either all of them or none.

        Returns False for a page that another call has published first; its slot is freed.
        """
        self.order.flush()  # compute it now, so that the lock is not held for it
        with self.changes:
            with self.lock:
                fresh = [self.index.find(page.key) is None for page in pages]
            put = [page for page, is_fresh in zip(pages, fresh, strict=True) if is_fresh]
            if put:
                self.journal.append(Kind.PUT, b"".join(map(_put_record, put)))
            with self.lock:
                self.order.add([(page.key, self.adopt(page)) for page in put])
        self.release(p.place for p, is_fresh in zip(pages, fresh, strict=True) if not is_fresh)
        return fresh

    def adopt(self, page: NewPage) -> int:
        """Add a page whose slot is already taken to the index; return its entry.

        Hold `lock`, or be the only thread.
        """
        segment, slot = page.place
        entry = self.index.add(page.key, segment.number, slot, page.length)
        self.order.set_tick(entry, page.tick)
        segment.slots.entries[slot] = entry
        self.index.link(entry)  # Link it last, because lookups take no lock.
        return entry

    def forget(self, entry: int) -> None:
        """Remove a page from the index. Hold `lock`, or be the only thread.

        Its slot is freed at once, or when the entry is no longer pinned.
        """
        self.index.unlink(entry)
        self.set_mark(entry, pending=False)
        if entry in self._pins:
            self._released_on_unpin.add(entry)
        else:
            self._release(entry)

    def evict(self, victims: Iterable[tuple[int, int]], rank: Callable[[int], int]) -> int:
        """Evict pages, given as rank and entry; return how many were evicted.

        Keeps a page that is pinned, pending, or was used after it was chosen. A spill uses all
        ancestors of its pages, so no stored page ends up behind an evicted one.
        """
        with self.changes:  # While this lock is held, no page is published.
            self.order.flush()
            with self.lock:
                entries = [
                    entry
                    for given, entry in victims
                    if entry not in self._pins
                    and entry not in self.pending
                    and rank(entry) == given
                ]
            return self.drop(entries)

    def drop(self, entries: Collection[int]) -> int:
        """Remove pages; return how many were removed."""
        with self.changes:
            with self.lock:
                entries = [entry for entry in dict.fromkeys(entries) if self.index.key(entry)]
                records = b"".join(map(self._slot_record, entries))
            if entries:
                self.journal.append(Kind.FREE, records)
            with self.lock:
                for entry in entries:
                    self.forget(entry)
        return len(entries)

    def move(self, moves: Iterable[tuple[int, Place]]) -> dict[int, int]:
        """Move pages to reserved slots that hold copies of them. Their entries must be pinned.

        Returns the new entry by old entry. Pages that were dropped or marked pending meanwhile are
        not moved. Loads from the old slot can continue: it is freed when it is unpinned.
        """
        self.order.flush()
        with self.changes:
            with self.lock:
                movable = [
                    (entry, NewPage(key, place, self.index.lengths[entry], self.order.tick(entry)))
                    for entry, place in moves
                    if entry not in self.pending and (key := self.index.key(entry)) is not None
                ]
            if movable:
                self.journal.append(Kind.PUT, b"".join(_put_record(page) for _, page in movable))
            successors: dict[int, int] = {}
            with self.lock:
                for entry, page in movable:
                    successors[entry] = successor = self.adopt(page)
                    self.order.copy_uses(entry, successor)
                    self.index.retire(entry)
                    self._released_on_unpin.add(entry)
        return successors

    def remember_evicted(self, entries: Iterable[int]) -> None:
        """Save the use counts of pages that are about to be evicted, in the eviction order."""
        self.order.flush()
        with self.lock:
            keys = ((self.index.key(entry), entry) for entry in entries)
            self.order.remember_evicted((key, entry) for key, entry in keys if key is not None)

    def drop_keys(self, keys: Iterable[PageKey]) -> int:
        """Remove pages, including `absent` ones; return how many were removed."""
        with self.changes:
            keys = list(keys)
            found = [self.index.find(key) for key in keys]
            absent = self.absent.find(keys)
            if absent:
                self.journal.append(Kind.FREE, b"".join(starmap(SLOT.pack, absent)))
                for slot in absent:
                    self.absent.free(slot)
            return self.drop([entry for entry in found if entry is not None]) + len(absent)

    def keys_of(self, namespace: bytes) -> list[PageKey]:
        """Return the pages of a namespace, including `absent` ones."""
        with self.changes:
            absent = self.absent.of_namespace(namespace)
        hashes = list(self.index.of_namespace(namespace))
        return [*(PageKey(namespace, page_hash) for page_hash in hashes), *absent]

    def _release(self, entry: int) -> None:
        self.segments.release(self.place(entry))
        self.index.free(entry)

    # Pending uploads

    def mark(self, keys: Iterable[PageKey], *, pending: bool) -> int:
        """Set or clear the pending mark of pages.

        Returns the number of leading pages that are stored. Only these are marked. Marks are
        cleared even if the journal cannot be written: uploaded pages can then be evicted, and at
        worst they are uploaded again after a restart.
        """
        with self.changes:
            found = [self.index.find(key) for key in keys]
            length = found.index(None) if None in found else len(found)
            changed = [
                entry
                for entry in dict.fromkeys(found[:length] if pending else found)
                if entry is not None and (entry in self.pending) != pending
            ]
            records = b"".join(map(self._slot_record, changed))
            if changed and pending:
                self.journal.append(Kind.PENDING, records)
            with self.lock:
                for entry in changed:
                    self.set_mark(entry, pending=pending)
            if changed and not pending:
                self.journal.append(Kind.UPLOADED, records)
        return length

    def set_mark(self, entry: int, *, pending: bool) -> None:
        """Set or clear one mark. Hold `lock`, or be the only thread."""
        if pending != (entry in self.pending):
            self.pending_by_segment[self.index.segments[entry]] += 1 if pending else -1
        if pending:
            self.pending[entry] = None
        else:
            self.pending.pop(entry, None)

    def pending_pages(self) -> list[PendingPage]:
        """Return the pages pending upload, oldest mark first."""
        with self.lock:
            pending = [(self.index.key(e), self.index.lengths[e]) for e in self.pending]
        return [PendingPage(key, length) for key, length in pending if key is not None]

    def _slot_record(self, entry: int) -> bytes:
        return SLOT.pack(self.index.segments[entry], self.index.slots[entry])

    # Writing journals

    def start_journal(self, folder: Folder) -> None:
        """Write a journal of all pages. Replaces any earlier journal."""
        self.journal = self._new_journal(folder)
        self.journal.take_over()
        folder.sync()

    def compact(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Replace the journal with a snapshot of all pages, including when they were last used.

        Does not block other calls. The snapshot is taken in batches. All changes since its start
        are appended, and a replay applies them to the snapshot. Raises `CompactionGivenUpError`
        once `give_up` returns True; the journal is then unchanged.
        """
        journal = self.journal
        with self.changes:
            changes = journal.copies = []
        try:
            successor = self._new_journal(journal.folder, give_up)
            with self.changes:
                try:
                    successor.append_frames(changes)
                    successor.take_over()
                except OSError:
                    successor.discard()
                    raise
                self.journal = successor
            # close it after releasing `changes`, so that spills do not wait for that
            journal.folder.sync()
        finally:
            journal.copies = None
            if self.journal is not journal:
                journal.close()

    def journal_size_if_new(self) -> int:
        """Return the size in bytes of a new journal, without its pending marks."""
        return (len(self.index) + len(self.absent)) * PUT.size

    def _new_journal(self, folder: Folder, give_up: Callable[[], bool] = lambda: False) -> Journal:
        """Write a snapshot to a new file, next to the journal that it will replace."""
        journal = Journal.begin_successor(folder)
        try:
            self._write_snapshot(journal, give_up)
            journal.append(Kind.SNAPSHOT_END, b"")
            journal.sync()
        except BaseException:  # BaseException covers signals during the start
            journal.discard()
            raise
        return journal

    def _write_snapshot(self, journal: Journal, give_up: Callable[[], bool]) -> None:
        # Write absent pages first, so that a copy that was stored later overrides them.
        self._write_absent(journal)
        for first in range(0, self.index.entries, _SNAPSHOT_BATCH):
            if give_up():
                raise CompactionGivenUpError
            with self.lock:
                batch = range(first, min(first + _SNAPSHOT_BATCH, self.index.entries))
                records = [self._snapshot_record(e) for e in batch if self.index.key(e)]
            if records:
                journal.append(Kind.PUT, b"".join(records))
        with self.lock:
            pending = b"".join(map(self._slot_record, self.pending))
        if pending:
            journal.append(Kind.PENDING, pending)

    def _write_absent(self, journal: Journal) -> None:
        with self.changes:
            records = b"".join(map(_absent_record, self.absent))
            pending = b"".join(starmap(SLOT.pack, self.absent.pending))
        if records:
            journal.append(Kind.PUT, records)
        if pending:
            journal.append(Kind.PENDING, pending)

    def _snapshot_record(self, entry: int) -> bytes:
        key = self.index.key(entry)
        assert key is not None
        page = NewPage(key, self.place(entry), self.index.lengths[entry], self.order.tick(entry))
        return _put_record(page)


def _put_record(page: NewPage) -> bytes:
    segment, slot = page.place
    return PUT.pack(*page.key, segment.number, slot, page.length, page.tick)


def _absent_record(page: Put) -> bytes:
    return PUT.pack(*page.key, page.segment, page.slot, page.length, page.tick)
