"""What the tier holds and where: index, slots, order of use, marks and journal, kept in step.

Two locks. `changes` is held through a whole change, the write to the journal included, so that the
journal has changes in the order in which they happened. `lock` is held for moments only and never
while anything blocks. Looking pages up takes neither.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import starmap
from typing import NamedTuple

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.tiers.base import PendingPage
from memkv_sglang.tiers.eviction import EvictionOrder
from memkv_sglang.tiers.nvme.absent import AbsentPages
from memkv_sglang.tiers.nvme.files import Folder
from memkv_sglang.tiers.nvme.index import Index
from memkv_sglang.tiers.nvme.journal import PUT, SLOT, Journal, Kind, Put
from memkv_sglang.tiers.nvme.segment import Place
from memkv_sglang.tiers.nvme.segments import Segments

_SNAPSHOT_BATCH = 512
"""Entries that a snapshot reads in one hold of the lock: a fraction of a millisecond."""


class NewPage(NamedTuple):
    """A page that is on disk but not yet in the catalog."""

    key: PageKey
    place: Place
    length: int
    tick: int


class SlotDescription(NamedTuple):
    """Where a page lies and in what state, for `memkv inspect`."""

    key: PageKey
    segment: int
    slot: int
    slot_size: int
    """Bytes on disk, footer included."""
    offset: int
    """Where in the segment file the slot begins."""
    length: int
    """Bytes of content."""
    pending: bool
    """Whether it waits for upload."""


class CompactionGivenUpError(Exception):
    """There was no time to write the journal anew."""


class Catalog:
    """Thread-safe. Calls that change it block on the journal and raise its `OSError`."""

    def __init__(self, segments: Segments) -> None:
        """Begin empty, without a journal: recovery fills it and sets `journal`."""
        self.journal: Journal
        self.segments = segments
        self.index = Index()
        self.order = EvictionOrder()
        self.pending: dict[int, None] = {}
        """Entries that wait for upload, those that were marked first before the others."""
        self.waiting: Counter[int] = Counter()
        """How many of them each segment has, by its number."""
        self.kept: Collection[PageKey] = frozenset()
        """Pages that are not evicted, whether they are there or not."""
        self.absent = AbsentPages()
        """Pages in segments that could not be opened. They stay in the journal."""
        self.changes = threading.RLock()
        self.lock = threading.Lock()
        self._pins: dict[int, int] = {}
        self._condemned: set[int] = set()

    @property
    def is_partial(self) -> bool:
        """Whether some segments could not be opened: their pages are `absent`."""
        return bool(self.segments.unopened)

    # Finding pages

    def walk(self, chain: Chain) -> list[int]:
        """Return the entries of the chain's pages up to the first that is not there."""
        pages = self.index.of_namespace(chain.namespace)
        entries: list[int] = []
        with suppress(KeyError):  # what came before the first missing page has been appended
            entries.extend(map(pages.__getitem__, chain.hashes))
        return entries

    def pin(self, keys: Iterable[PageKey]) -> list[int | None]:
        """Return the pages' entries, None for what is not there.

        Until `unpin`, their slots keep their content, even if the pages are dropped.
        """
        with self.lock:
            entries = [self.index.find(key) for key in keys]
            for entry in entries:
                if entry is not None:
                    self._pins[entry] = self._pins.get(entry, 0) + 1
        return entries

    def unpin(self, entries: Iterable[int | None]) -> None:
        """Undo `pin`, with its answer."""
        with self.lock:
            for entry in entries:
                if entry is None:
                    continue
                self._pins[entry] -= 1
                if not self._pins[entry]:
                    del self._pins[entry]
                    if entry in self._condemned:
                        self._condemned.remove(entry)
                        self._release(entry)

    def is_pinned(self, entry: int) -> bool:
        """Tell whether somebody reads the page; call with `lock` held."""
        return entry in self._pins

    def is_kept(self, entry: int) -> bool:
        """Tell whether the page is one that is not evicted."""
        return bool(self.kept) and self.index.key(entry) in self.kept

    def place(self, entry: int) -> Place:
        """Return where the page lies; the entry must be pinned, or `lock` held."""
        number = self.index.segments[entry]
        return Place(self.segments.by_number[number], self.index.slots[entry])

    def describe(self, key: PageKey) -> SlotDescription | None:
        """Tell where a page lies and in what state."""
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

    # Changing what is there

    def reserve(self, slot_size: int, count: int) -> list[Place]:
        """Take up to `count` free slots, consecutive ones as far as there are any."""
        with self.lock:
            return self.segments.reserve(slot_size, count)

    def release(self, places: Iterable[Place]) -> None:
        """Give reserved slots back that were not published."""
        with self.lock:
            for place in places:
                self.segments.release(place)

    def publish(self, pages: Sequence[NewPage]) -> list[bool]:
        """Make the pages part of the catalog, in order, all or none of them.

        A page that came to be there meanwhile is answered False, and its new slot given back.
        """
        self.order.settle()  # lest it be done under the lock
        with self.changes:
            with self.lock:
                fresh = [self.index.find(page.key) is None for page in pages]
            put = [page for page, is_fresh in zip(pages, fresh, strict=True) if is_fresh]
            if put:
                self.journal.append(Kind.PUT, b"".join(map(_put_record, put)))
            with self.lock:
                self.order.enter([(page.key, self.adopt(page)) for page in put])
        self.release(p.place for p, is_fresh in zip(pages, fresh, strict=True) if not is_fresh)
        return fresh

    def adopt(self, page: NewPage) -> int:
        """Enter a page whose slot is taken, return its entry.

        Call with `lock` held, or as the only thread.
        """
        segment, slot = page.place
        entry = self.index.add(page.key, segment.number, slot, page.length)
        self.order.set(entry, page.tick)
        segment.slots.entries[slot] = entry
        self.index.link(entry)  # last, as lookups take no lock
        return entry

    def forget(self, entry: int) -> None:
        """Take a page out of the index; call with `lock` held, or as the only thread.

        Its slot is free once nobody reads it: the last one to unpin it gives it back.
        """
        self.index.unlink(entry)
        self.set_mark(entry, pending=False)
        if entry in self._pins:
            self._condemned.add(entry)
        else:
            self._release(entry)

    def evict(self, victims: Iterable[tuple[int, int]], rank: Callable[[int], int]) -> int:
        """Forget pages, given as rank and entry, to make room; return how many.

        A page stays if it is pinned, waits for upload, or was used since it got its rank: a spill
        uses the pages before its own, so none of its pages ends up behind an evicted one.
        """
        with self.changes:  # no page is published meanwhile
            self.order.settle()
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
        """Forget pages, return how many."""
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
        """Let pages lie in reserved slots that hold a copy of them; the entries are pinned.

        Returns the new entries of those that were moved. A page that has left meanwhile, or waits
        for upload by now, is not. Who reads a page at its old place goes on: that is free when it
        is unpinned.
        """
        self.order.settle()
        with self.changes:
            with self.lock:
                able = [
                    (entry, NewPage(key, place, self.index.lengths[entry], self.order.tick(entry)))
                    for entry, place in moves
                    if entry not in self.pending and (key := self.index.key(entry)) is not None
                ]
            if able:
                self.journal.append(Kind.PUT, b"".join(_put_record(page) for _, page in able))
            successors: dict[int, int] = {}
            with self.lock:
                for entry, page in able:
                    successors[entry] = successor = self.adopt(page)
                    self.order.succeed(entry, successor)
                    self.index.retire(entry)
                    self._condemned.add(entry)
        return successors

    def remember(self, entries: Iterable[int]) -> None:
        """Let the order of eviction remember pages that are about to make room."""
        self.order.settle()
        with self.lock:
            keys = ((self.index.key(entry), entry) for entry in entries)
            self.order.leave((key, entry) for key, entry in keys if key is not None)

    def drop_keys(self, keys: Iterable[PageKey]) -> int:
        """Forget the pages, those that cannot be read at present too; return how many."""
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
        """Return the pages of a namespace, those that cannot be read at present too."""
        with self.changes:
            absent = self.absent.of_namespace(namespace)
        hashes = list(self.index.of_namespace(namespace))
        return [*(PageKey(namespace, page_hash) for page_hash in hashes), *absent]

    def _release(self, entry: int) -> None:
        self.segments.release(self.place(entry))
        self.index.free(entry)

    # Marks

    def mark(self, keys: Iterable[PageKey], *, pending: bool) -> int:
        """Set or clear the mark of pages that wait for upload, where it is not so already.

        Returns how many of them, from the first on, are there; none behind these is set. A mark is
        cleared even if the journal takes no more: pages that are uploaded may leave, and after a
        restart are uploaded once more at worst.
        """
        with self.changes:
            found = [self.index.find(key) for key in keys]
            there = found.index(None) if None in found else len(found)
            changed = [
                entry
                for entry in dict.fromkeys(found[:there] if pending else found)
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
        return there

    def set_mark(self, entry: int, *, pending: bool) -> None:
        """Note a mark; call with `lock` held, or as the only thread."""
        if pending != (entry in self.pending):
            self.waiting[self.index.segments[entry]] += 1 if pending else -1
        if pending:
            self.pending[entry] = None
        else:
            self.pending.pop(entry, None)

    def pending_pages(self) -> list[PendingPage]:
        """Return the pages that wait, those that were marked first before the others."""
        with self.lock:
            waiting = [(self.index.key(e), self.index.lengths[e]) for e in self.pending]
        return [PendingPage(key, length) for key, length in waiting if key is not None]

    def _slot_record(self, entry: int) -> bytes:
        return SLOT.pack(self.index.segments[entry], self.index.slots[entry])

    # The journal's beginning and its successors

    def begin_journal(self, folder: Folder) -> None:
        """Write a journal of what is there, over whatever journal there was."""
        self.journal = self._new_journal(folder)
        self.journal.take_over()
        folder.sync()

    def compact(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Write a new journal of what is there now, with the order of use, and change over to it.

        Other calls go on meanwhile: the snapshot is taken in pieces, and what changes from its
        begin on is appended behind it, where it is replayed over whatever the snapshot caught.
        Raises `CompactionGivenUpError` once it is to `give_up`; the journal is then as before.
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
            journal.folder.sync()  # not above, where it would hold up spills
        finally:
            journal.copies = None
            if self.journal is not journal:
                journal.close()

    def journal_size_if_new(self) -> int:
        """Return the bytes that a new journal would have, but for pages that wait for upload."""
        return (len(self.index) + len(self.absent)) * PUT.size

    def _new_journal(self, folder: Folder, give_up: Callable[[], bool] = lambda: False) -> Journal:
        """Write a snapshot beside the journal it is to replace."""
        journal = Journal.begin_successor(folder)
        try:
            self._write_snapshot(journal, give_up)
            journal.append(Kind.SNAPSHOT_END, b"")
            journal.sync()
        except BaseException:  # a signal may end the start here
            journal.discard()
            raise
        return journal

    def _write_snapshot(self, journal: Journal, give_up: Callable[[], bool]) -> None:
        self._write_absent(journal)  # first: a page that was stored again since takes its place
        for first in range(0, self.index.entries, _SNAPSHOT_BATCH):
            if give_up():
                raise CompactionGivenUpError
            with self.lock:
                batch = range(first, min(first + _SNAPSHOT_BATCH, self.index.entries))
                records = [self._snapshot_record(e) for e in batch if self.index.key(e)]
            if records:
                journal.append(Kind.PUT, b"".join(records))
        with self.lock:
            waiting = b"".join(map(self._slot_record, self.pending))
        if waiting:
            journal.append(Kind.PENDING, waiting)

    def _write_absent(self, journal: Journal) -> None:
        with self.changes:
            records = b"".join(map(_absent_record, self.absent))
            waiting = b"".join(starmap(SLOT.pack, self.absent.pending))
        if records:
            journal.append(Kind.PUT, records)
        if waiting:
            journal.append(Kind.PENDING, waiting)

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
