"""Room for more pages: another segment, one of another slot size, or the coldest pages' slots."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from memkv_sglang.tiers.eviction import Victims
from memkv_sglang.tiers.nvme.catalog import Catalog
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory, read_fully, write_fully
from memkv_sglang.tiers.nvme.faults import PAUSE, FaultLog
from memkv_sglang.tiers.nvme.segment import Place, Segment
from memkv_sglang.tiers.nvme.slots import NO_ENTRY

_SCAN_CHUNK = 4096
"""Entries looked at between two chances for other threads to run."""
_TRIM_BATCH = 256
"""Pages that leave with one frame in the journal when nobody waits for the room."""
_SHRINK_BATCH = 4096
"""The same when the files have to shrink."""
_MOVE_BATCH = 64
"""Slots of which the pages move before other threads get their turn."""
_MOVED_IN_A_CALL = 64 << 20
"""Bytes of pages that a spill may have to wait for while they move."""
_SCAN_LIMIT = 4096
"""Victims looked for at once by a spill that waits."""


class _Vacancy(NamedTuple):
    """A segment that may be made empty."""

    segment: Segment
    excess: int
    """Pages of it for which there is no free slot elsewhere."""


class SpaceReclaimer:
    """Decides what leaves. Its calls block on the disk and raise the journal's `OSError`."""

    def __init__(self, catalog: Catalog, high: float, low: float, faults: FaultLog) -> None:
        """Begin to trim a slot size where its use is above `high`, and end at `low` (shares)."""
        self.evicted = 0
        """Pages that had to leave."""
        self._catalog = catalog
        self._high = high
        self._low = low
        self._faults = faults
        self._victims_of: dict[int | None, Victims] = {}
        """By slot size; None for all."""
        self._no_segments_until = 0.0
        self._no_segments_why = "nvme.capacity is too small"
        self._one_at_a_time = threading.RLock()
        self._scratch = memoryview(b"")
        self._stopped = False
        self._wanted: set[int] = set()
        """Slot sizes for which a segment of another size is to go."""

    def make(self, slot_size: int, count: int) -> bool:
        """Make room for some of `count` more pages; False if nothing more can leave.

        Pages that wait for upload never do: no other place has them yet.
        """
        with self._one_at_a_time:
            if self._catalog.segments.free_slots(slot_size):
                return True  # somebody else made it meanwhile
            if self._add_segment(slot_size):
                return True
            while self._reclaim_segment(slot_size):
                if self._add_segment(slot_size):
                    return True
            is_made = self._evict(slot_size, count) > 0
            if not is_made and (waiting := len(self._catalog.pending)):
                self._faults.report("disk is full of pages that wait for upload", pages=waiting)
            return is_made

    def why_none(self) -> str:
        """Say why `make` found no room."""
        if waiting := len(self._catalog.pending):
            return f"{waiting} pages that wait for upload take all the room"
        return self._no_segments_why

    def is_short(self) -> bool:
        """Tell whether there is something for `shrink`, `reclaim` or `trim` to do."""
        segments = self._catalog.segments
        return (
            self.is_too_large()
            or bool(self._wanted)
            or any(self._use(size) > self._high for size in list(segments.by_slot_size))
        )

    def is_too_large(self) -> bool:
        """Tell whether the files have to shrink."""
        return self._catalog.segments.spare() < 0

    def trim(self) -> None:
        """Let the coldest pages of every slot size above the high watermark leave."""
        for slot_size in list(self._catalog.segments.by_slot_size):
            if self._use(slot_size) > self._high:
                while (
                    self._goes_on()
                    and self._use(slot_size) > self._low
                    and self._trim_batch(slot_size)
                ):
                    pass

    def _trim_batch(self, slot_size: int) -> bool:
        with self._one_at_a_time:
            if self._reclaim_segment(slot_size):
                return True
            excess = int((self._use(slot_size) - self._low) * self._slots(slot_size))
            return self._evict(slot_size, min(max(excess, 1), _TRIM_BATCH), must=False) > 0

    def shrink(self, until: float = math.inf) -> None:
        """Remove segments until the files fit into the capacity and leave `keep_free`.

        The coldest pages of all leave, as many as there are too many, so chains lose their ends.
        Then whole segments become empty: what is left in them moves to free slots of others.
        Segments with pages that wait for upload stay until these wait no more. Gives up at `until`
        (`time.monotonic`) or after `stop`; another call goes on.
        """
        self._victims_of.pop(None, None)  # from an earlier time
        while self._goes_on(until) and self._shrink_once(until):
            pass

    def stop(self) -> None:
        """Let `shrink` and `trim` end soon, now and from now on."""
        self._stopped = True

    def _goes_on(self, until: float = math.inf) -> bool:
        return not self._stopped and time.monotonic() < until

    def _shrink_once(self, until: float) -> bool:
        """Do a part of what `shrink` has to do; False if there is nothing (more) to be done."""
        with self._one_at_a_time:
            segments = self._catalog.segments
            if not segments.total or segments.spare() >= 0:
                return False
            easiest = self._easiest(segments)
            if easiest is None:
                return False
            if easiest.excess:
                count = min(easiest.excess, _SHRINK_BATCH)
                return self._evict(None, count) > 0 or self._evict_kept(count) > 0
        return self._vacate(easiest.segment, until)

    def _slots(self, slot_size: int) -> int:
        segments = self._catalog.segments
        own = sum(len(segment.slots) for segment in segments.of_size(slot_size))
        return own + segments.slots_to_come(slot_size)

    def _use(self, slot_size: int) -> float:
        """Return the share of taken slots in those that there are and may yet be."""
        own = self._catalog.segments.of_size(slot_size)
        taken = sum(len(segment.slots) - segment.slots.free for segment in own)
        return taken / max(self._slots(slot_size), 1)

    # Segments

    def _add_segment(self, slot_size: int) -> bool:
        if time.monotonic() < self._no_segments_until:
            return False
        segments = self._catalog.segments
        try:
            segment = segments.create(slot_size)
        except OSError as error:
            self._no_segments_until = time.monotonic() + PAUSE
            self._no_segments_why = str(error)
            self._faults.report("no room on disk for another segment", error=str(error))
            return False
        if segment is None:
            return False
        with self._catalog.lock:
            segments.add(segment)
        return True

    def _reclaim_segment(self, slot_size: int) -> bool:
        """Remove a segment of another slot size, if that size has the coldest pages of all.

        Not if many pages would have to move: `reclaim` does that.
        """
        segment = self._find_removable(slot_size)
        if segment is not None and segment.taken_bytes > _MOVED_IN_A_CALL:
            self._wanted.add(slot_size)
            return False
        return segment is not None and self._vacate(segment)

    def reclaim(self) -> None:
        """Remove segments of other sizes for which no call could wait."""
        while self._wanted and self._goes_on():
            slot_size = self._wanted.pop()
            with self._one_at_a_time:
                segment = self._find_removable(slot_size)
            if segment is not None:
                self._vacate(segment)

    def _find_removable(self, slot_size: int) -> Segment | None:
        """Let pages of another size leave, as long as it has the coldest, until a segment can go.

        Returns one whose pages have room elsewhere; None if those of this size are colder.
        """
        others = [s for s in self._catalog.segments if s.slot_size != slot_size]
        empty = next(filter(_is_empty, others), None)
        if empty is not None or not others:
            return empty
        while (size := self._coldest_size()) is not None and size != slot_size:
            easiest = self._easiest(s for s in others if s.slot_size == size)
            if easiest is None:
                return None
            if not easiest.excess:
                return easiest.segment
            if not self._evict(size, min(easiest.excess, _TRIM_BATCH), must=False):
                return None
        return None

    def _coldest_size(self) -> int | None:
        """Return the slot size of the page that leaves first of all; None if none may leave."""
        pages = len(self._catalog.index)
        ranks = {
            size: rank
            for size in list(self._catalog.segments.by_slot_size)
            if not self._all_wait(size) and (rank := self._victims(size).peek(pages)) is not None
        }
        return min(ranks, key=ranks.__getitem__, default=None)

    def _all_wait(self, slot_size: int) -> bool:
        """Tell whether all pages of a size wait for upload: then there is nothing to search."""
        segments, waiting = self._catalog.segments.of_size(slot_size), self._catalog.waiting
        return all(waiting[s.number] >= len(s.slots) - s.slots.free for s in segments)

    def _easiest(self, segments: Iterable[Segment]) -> _Vacancy | None:
        """Return the segment that can be made empty with the fewest bytes lost, then moved.

        None where each has pages that wait for upload.
        """
        waiting, free = self._catalog.waiting, self._catalog.segments.free_slots
        free_slots = {size: free(size) for size in list(self._catalog.segments.by_slot_size)}
        vacancies = []
        for segment in segments:
            if not waiting[segment.number]:
                taken = len(segment.slots) - segment.slots.free
                elsewhere = free_slots[segment.slot_size] - segment.slots.free
                vacancies.append(_Vacancy(segment, max(taken - elsewhere, 0)))
        return min(
            vacancies,
            key=lambda v: (v.excess * v.segment.slot_size, v.segment.taken_bytes, v.segment.number),
            default=None,
        )

    def _vacate(self, segment: Segment, until: float = math.inf) -> bool:
        """Move a segment's pages to free slots of others, then remove its file.

        False if some have to stay for now, or at `until`.
        """
        segment.leaving = True
        try:
            for first in range(0, len(segment.slots), _MOVE_BATCH):
                if not self._goes_on(until):
                    return False
                with self._one_at_a_time:
                    slots = range(first, min(first + _MOVE_BATCH, len(segment.slots)))
                    if not self._move(segment, slots):
                        return False
            with self._one_at_a_time:
                return self._remove_segment(segment)
        finally:
            segment.leaving = False

    def _move(self, segment: Segment, slots: range) -> bool:
        """Move the pages in these slots elsewhere; False if there is no room for them."""
        entries = [segment.slots.entries[slot] for slot in slots]
        keys = [key for e in entries if e != NO_ENTRY and (key := self._catalog.index.key(e))]
        pinned = self._catalog.pin(keys)  # until then a page may come to lie elsewhere
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
            for victims in self._victims_of.values():
                victims.follow(moved)
            self._catalog.drop([e for e in unreadable if e not in self._catalog.pending])
        finally:
            self._catalog.release(places)
            self._catalog.unpin(pinned)
        return True

    def _lies_in(self, segment: Segment, entry: int) -> bool:
        return self._catalog.index.segments[entry] == segment.number

    def _copy(self, entry: int, place: Place) -> bool:
        """Copy a page with its footer, so that its checksum goes with it; False if unreadable."""
        source = self._catalog.place(entry)
        size = place.segment.slot_size
        if len(self._scratch) < size:
            self._scratch = aligned_memory(size)
        content = [self._scratch[:size]]
        try:
            read_fully(source.segment.fd, content, source.segment.offset(source.slot))
        except (OSError, EOFError) as error:
            self._faults.report("page that was to be moved cannot be read", error=str(error))
            return False
        write_fully(place.segment.fd, content, place.segment.offset(place.slot))
        return True

    def _remove_segment(self, segment: Segment) -> bool:
        """Remove an empty segment's file; False if the segment is not empty.

        Raises `OSError` where the file cannot be removed: it stays a segment then.
        """
        catalog = self._catalog
        with catalog.lock:
            if not _is_empty(segment):
                return False
            catalog.segments.discard(segment)  # first, lest a spill reserve slots of it
        try:
            catalog.segments.remove_file(segment)
        except OSError:
            with catalog.lock:
                catalog.segments.add(segment)
            raise
        segment.close()
        return True

    # Pages

    def _evict(self, slot_size: int | None, count: int, *, must: bool = True) -> int:
        """Let the `count` coldest pages of a slot size leave, or of all; return how many did.

        Pages of chains that are being spilled leave only if some page `must`.
        """
        evicted, pages = 0, len(self._catalog.index)
        self._catalog.order.adapt(pages)
        while evicted < count:
            victims = self._victims(slot_size).take(pages, count - evicted)
            if not victims:
                break
            evicted += self._drop(victims, self._catalog.order.rank)
        if must and not evicted:
            # By age: the youngest chain waits for this room, though its end may be worth least.
            coldest = self._catalog.order.coldest(
                self._entries(slot_size), self._may_leave_growing, count, by_age=True
            )
            evicted = self._drop(coldest, self._catalog.order.tick)
        return evicted

    def _evict_kept(self, count: int) -> int:
        """Let the coldest pages leave that are to be kept: the capacity comes before them."""
        chunks = self._chunks(self._catalog.segments)
        coldest = self._catalog.order.coldest(chunks, self._may_leave_kept, count)
        return self._drop(coldest, self._catalog.order.rank)

    def _drop(self, victims: list[tuple[int, int]], rank: Callable[[int], int]) -> int:
        self._catalog.remember(entry for _, entry in victims)
        dropped = self._catalog.evict(victims, rank)
        self.evicted += dropped
        return dropped

    def _victims(self, slot_size: int | None) -> Victims:
        if slot_size not in self._victims_of:
            self._victims_of[slot_size] = Victims(
                self._catalog.order,
                partial(self._entries, slot_size),
                self._may_leave,
                at_once=_SCAN_LIMIT if slot_size else None,
            )
        return self._victims_of[slot_size]

    def _entries(self, slot_size: int | None) -> Iterator[Sequence[int]]:
        if self._all_stay():
            return iter(())  # every spill would look at all of them in vain
        segments = self._catalog.segments
        return self._chunks(segments.of_size(slot_size) if slot_size else segments)

    def _chunks(self, segments: Iterable[Segment]) -> Iterator[Sequence[int]]:
        for segment in segments:
            for first in range(0, len(segment.slots), _SCAN_CHUNK):
                yield segment.slots.entries[first : first + _SCAN_CHUNK]

    def _all_stay(self) -> bool:
        """Tell whether every page waits for upload or is to be kept."""
        index, pending, kept = self._catalog.index, self._catalog.pending, self._catalog.kept
        if len(pending) + len(kept) < len(index) or len(kept) > len(index):
            return False  # in the second case a look at all pages takes less time than this
        entries = (index.find(key) for key in kept)
        others = sum(entry is not None and entry not in pending for entry in entries)
        return len(pending) + others >= len(index)

    def _may_leave(self, entry: int) -> bool:
        return not self._catalog.order.is_growing(entry) and self._may_leave_growing(entry)

    def _may_leave_growing(self, entry: int) -> bool:
        return self._may_leave_kept(entry) and not self._catalog.is_kept(entry)

    def _may_leave_kept(self, entry: int) -> bool:
        catalog = self._catalog
        return (
            entry not in catalog.pending
            and not catalog.is_pinned(entry)
            and catalog.index.key(entry) is not None
        )


def _is_empty(segment: Segment) -> bool:
    return segment.slots.free == len(segment.slots)
