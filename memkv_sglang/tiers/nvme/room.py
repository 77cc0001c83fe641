"""Room for more pages: another segment, another slot size's cold segment, or the coldest pages."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from memkv_sglang.tiers.eviction import Victims
from memkv_sglang.tiers.nvme.catalog import Catalog
from memkv_sglang.tiers.nvme.faults import PAUSE, FaultLog
from memkv_sglang.tiers.nvme.segment import Segment
from memkv_sglang.tiers.nvme.slots import NO_ENTRY

_SCAN_CHUNK = 4096
"""Entries looked at between two chances for other threads to run."""
_TRIM_BATCH = 256
"""Pages that leave with one frame in the journal when nobody waits for the room."""


class Room:
    """Decides what leaves. Its calls block on the disk and raise the journal's `OSError`."""

    def __init__(self, catalog: Catalog, high: float, low: float, faults: FaultLog) -> None:
        """Begin to trim a slot size where its use is above `high`, and end at `low` (shares)."""
        self.evicted = 0
        """Pages that had to leave."""
        self._catalog = catalog
        self._high = high
        self._low = low
        self._faults = faults
        self._victims_of: dict[int, Victims] = {}
        """By slot size."""
        self._no_segments_until = 0.0
        self._no_segments_why = "nvme.capacity is too small"
        self._one_at_a_time = threading.Lock()

    def make(self, slot_size: int, count: int) -> bool:
        """Make room for some of `count` more pages; False if nothing more can leave.

        Pages that wait for upload never do: no other place has them yet.
        """
        with self._one_at_a_time:
            if any(segment.slots.free for segment in self._catalog.segments.of_size(slot_size)):
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
        """Tell whether there is something for `shrink` or `trim` to do."""
        segments = self._catalog.segments
        return segments.spare() < 0 or any(
            self._use(size) > self._high for size in list(segments.by_slot_size)
        )

    def trim(self) -> None:
        """Let the coldest pages of every slot size above the high watermark leave."""
        for slot_size in list(self._catalog.segments.by_slot_size):
            if self._use(slot_size) > self._high:
                while self._use(slot_size) > self._low and self._trim_batch(slot_size):
                    pass

    def _trim_batch(self, slot_size: int) -> bool:
        with self._one_at_a_time:
            if self._reclaim_segment(slot_size):
                return True
            excess = int((self._use(slot_size) - self._low) * self._slots(slot_size))
            return self._evict(slot_size, min(max(excess, 1), _TRIM_BATCH)) > 0

    def shrink(self) -> None:
        """Remove the coldest segments until the files fit into the capacity and leave `keep_free`.

        Those with pages to be kept are removed last, those with pages that wait for upload only
        once these wait no more.
        """
        with self._one_at_a_time:
            segments = self._catalog.segments
            while segments.total and segments.spare() < 0:
                removable = self._removable(segments)
                if not removable or not self._remove_segment(removable[0]):
                    return

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
        """Remove another slot size's segment if all in it is colder than the own coldest page."""
        segments = self._catalog.segments
        others = [segment for segment in segments if segment.slot_size != slot_size]
        if not others:
            return False
        others.sort(key=_is_empty, reverse=True)  # no page leaves while such a file is to be had
        coldest = self._victims(slot_size).peek(len(self._catalog.index))
        if coldest is not None:
            colder = (s for s in others if self._is_colder(s, coldest))
            return any(map(self._remove_segment, colder))
        # Nothing of this size can leave, so some other has to.
        return any(map(self._remove_segment, self._removable(others)))

    def _removable(self, segments: Iterable[Segment]) -> list[Segment]:
        """Return those where no page waits for upload, in the order in which they leave."""
        catalog = self._catalog
        with catalog.lock:
            waiting = {catalog.index.segments[entry] for entry in catalog.pending}
        return sorted(
            (segment for segment in segments if segment.number not in waiting),
            key=lambda segment: (self._is_kept(segment), self._newest(segment)),
        )

    def _is_colder(self, segment: Segment, rank: int) -> bool:
        rank_of, pending = self._catalog.order.rank, self._catalog.pending
        return all(
            entry == NO_ENTRY
            or (rank_of(entry) < rank and entry not in pending and not self._catalog.is_kept(entry))
            for entry in segment.slots.entries
        )

    def _newest(self, segment: Segment) -> int:
        rank_of = self._catalog.order.rank
        return max((rank_of(e) for e in segment.slots.entries if e != NO_ENTRY), default=0)

    def _is_kept(self, segment: Segment) -> bool:
        """Tell whether some of its pages are to be kept."""
        is_kept = self._catalog.is_kept
        return any(entry != NO_ENTRY and is_kept(entry) for entry in segment.slots.entries)

    def _remove_segment(self, segment: Segment) -> bool:
        """Drop all pages of a segment and its file; False if some of them have to stay.

        Raises `OSError` where the file cannot be removed: it stays a segment then, an empty one.
        """
        catalog = self._catalog
        with catalog.lock:
            entries = [entry for entry in segment.slots.entries if entry != NO_ENTRY]
            taken = len(segment.slots) - segment.slots.free
            if taken != len(entries) or any(map(catalog.is_pinned, entries)):
                return False
        self.evicted += catalog.drop(entries, to_make_room=True)
        with catalog.lock:
            if segment.slots.free < len(segment.slots):
                return False
            catalog.segments.discard(segment)  # first, lest a spill reserve slots of it
        try:
            segment.path.unlink(missing_ok=True)
        except OSError:
            with catalog.lock:
                catalog.segments.add(segment)
            raise
        segment.close()
        return True

    # Pages

    def _evict(self, slot_size: int, count: int) -> int:
        evicted, pages = 0, len(self._catalog.index)
        self._catalog.order.adapt(pages)
        while evicted < count:
            victims = self._victims(slot_size).take(pages, count - evicted)
            if not victims:
                break
            self._catalog.remember(victims)
            evicted += self._catalog.drop(victims, to_make_room=True)
        self.evicted += evicted
        return evicted

    def _victims(self, slot_size: int) -> Victims:
        if slot_size not in self._victims_of:
            self._victims_of[slot_size] = Victims(
                self._catalog.order, partial(self._entries, slot_size), self._may_leave
            )
        return self._victims_of[slot_size]

    def _entries(self, slot_size: int) -> Iterator[Sequence[int]]:
        if self._all_stay():
            return  # every spill would look at all of them in vain
        for segment in self._catalog.segments.of_size(slot_size):
            for first in range(0, len(segment.slots), _SCAN_CHUNK):
                yield segment.slots.entries[first : first + _SCAN_CHUNK]

    def _all_stay(self) -> bool:
        """Tell whether every page waits for upload or is to be kept."""
        index, pending, kept = self._catalog.index, self._catalog.pending, self._catalog.kept
        if len(pending) + len(kept) < len(index):
            return False
        entries = (index.find(key) for key in kept)
        others = sum(entry is not None and entry not in pending for entry in entries)
        return len(pending) + others >= len(index)

    def _may_leave(self, entry: int) -> bool:
        catalog = self._catalog
        return (
            entry not in catalog.pending
            and not catalog.is_pinned(entry)
            and not catalog.is_kept(entry)
            and catalog.index.key(entry) is not None
        )


def _is_empty(segment: Segment) -> bool:
    return segment.slots.free == len(segment.slots)
