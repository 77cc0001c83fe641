"""Free slots for new pages: create a segment, remove one of another slot size, or evict pages."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from memkv_sglang.tiers.eviction import Victims
from memkv_sglang.tiers.nvme.catalog import Catalog
from memkv_sglang.tiers.nvme.faults import PAUSE, FaultLog
from memkv_sglang.tiers.nvme.page_mover import PageMover
from memkv_sglang.tiers.nvme.segment import Segment

_SCAN_CHUNK = 4096
"""Number of entries to scan before other threads get to run."""
_TRIM_BATCH = 256
"""Pages per journal frame when the background thread evicts."""
_SHRINK_BATCH = 4096
"""Pages per journal frame when pages are evicted so that files can shrink."""
_MOVE_BATCH = 64
"""Number of slots whose pages are moved before other threads get to run."""
_MAX_MOVED_PER_CALL = 64 << 20
"""Maximum bytes of pages that are moved while a spill waits."""
_MAX_VICTIMS_PER_SCAN = 4096
"""Maximum number of victims that a scan selects while a spill waits."""


class _EmptyingCost(NamedTuple):
    """What emptying a segment costs."""

    segment: Segment
    excess: int
    """Number of pages to evict because no other segment has a free slot for them."""


class SpaceReclaimer:
    """Frees space by evicting pages. Calls block on the disk and raise the journal's `OSError`."""

    def __init__(self, catalog: Catalog, high: float, low: float, faults: FaultLog) -> None:
        """Trim each slot size from above the watermark `high` down to `low` (0 to 1)."""
        self.evicted = 0
        """Pages evicted so far."""
        self._catalog = catalog
        self._high = high
        self._low = low
        self._faults = faults
        self._victims_of: dict[int | None, Victims] = {}
        """Victims by slot size; None stands for all sizes."""
        self._no_segments_until = 0.0
        self._no_segments_reason = "nvme.capacity is too small"
        self._reclaiming = threading.RLock()
        self._mover = PageMover(catalog, faults)
        self._stopped = False
        self._requested_sizes: set[int] = set()
        """Slot sizes for which the background thread must remove a segment of another size."""

    def reclaim_slots(self, slot_size: int, count: int) -> bool:
        """Free at least one slot, up to `count`; return False if that is impossible.

        Never evicts pages that are pending upload, because no other tier has them yet.
        """
        with self._reclaiming:
            if self._catalog.segments.free_slots(slot_size):
                return True  # another thread has freed some meanwhile
            if self._add_segment(slot_size):
                return True
            while self._reclaim_segment(slot_size):
                if self._add_segment(slot_size):
                    return True
            is_reclaimed = self._evict(slot_size, count) > 0
            if not is_reclaimed and (waiting := len(self._catalog.pending)):
                self._faults.report("disk is full of pages waiting for upload", pages=waiting)
            return is_reclaimed

    def refusal_reason(self) -> str:
        """Return why `reclaim_slots` could not free a slot."""
        if waiting := len(self._catalog.pending):
            return f"it is full of {waiting} pages waiting for upload"
        return self._no_segments_reason

    def has_work(self) -> bool:
        """Return whether `shrink`, `reclaim_segments` or `trim` has work to do."""
        segments = self._catalog.segments
        return (
            self.is_over_capacity()
            or bool(self._requested_sizes)
            or any(self._use(size) > self._high for size in list(segments.by_slot_size))
        )

    def is_over_capacity(self) -> bool:
        """Return whether the files have to shrink."""
        return self._catalog.segments.spare() < 0

    def trim(self) -> None:
        """Evict the coldest pages of every slot size that is above the high watermark."""
        for slot_size in list(self._catalog.segments.by_slot_size):
            if self._use(slot_size) > self._high:
                while (
                    self._may_continue()
                    and self._use(slot_size) > self._low
                    and self._trim_batch(slot_size)
                ):
                    pass

    def _trim_batch(self, slot_size: int) -> bool:
        with self._reclaiming:
            if self._reclaim_segment(slot_size):
                return True
            excess = int((self._use(slot_size) - self._low) * self._slots(slot_size))
            return self._evict(slot_size, min(max(excess, 1), _TRIM_BATCH), must=False) > 0

    def shrink(self, until: float = math.inf) -> None:
        """Remove segments until the files fit the capacity and leave `keep_free` bytes.

        Evicts the coldest pages of all sizes that no longer fit. Then moves the remaining pages of
        a segment to free slots elsewhere, and removes the segment's file. Keeps segments that have
        pages pending upload. Stops early at `until` (`time.monotonic`) or after `stop`; call it
        again to continue.
        """
        self._victims_of.pop(None, None)  # left by an earlier call
        while self._may_continue(until) and self._shrink_once(until):
            pass

    def stop(self) -> None:
        """Make current and future calls of `shrink` and `trim` return early."""
        self._stopped = True

    def _may_continue(self, until: float = math.inf) -> bool:
        return not self._stopped and time.monotonic() < until

    def _shrink_once(self, until: float) -> bool:
        """Evict a batch or empty one segment. Returns False if there is nothing left to do."""
        with self._reclaiming:
            segments = self._catalog.segments
            if not segments.total or segments.spare() >= 0:
                return False
            cheapest = self._cheapest_to_empty(segments)
            if cheapest is None:
                return False
            if cheapest.excess:
                count = min(cheapest.excess, _SHRINK_BATCH)
                return self._evict(None, count) > 0 or self._evict_exempt(count) > 0
        return self._remove_with_moves(cheapest.segment, until)

    def _slots(self, slot_size: int) -> int:
        segments = self._catalog.segments
        own = sum(len(segment.slots) for segment in segments.of_size(slot_size))
        return own + segments.potential_slots(slot_size)

    def _use(self, slot_size: int) -> float:
        """Return the fraction of slots in use. Counts slots of segments yet to be created."""
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
            self._no_segments_reason = str(error)
            self._faults.report("cannot create another segment", error=str(error))
            return False
        if segment is None:
            return False
        with self._catalog.lock:
            segments.add(segment)
        return True

    def _reclaim_segment(self, slot_size: int) -> bool:
        """Remove a segment of another slot size, if that size has the coldest pages.

        If removing the segment would move many pages, leaves it to `reclaim_segments`.
        """
        segment = self._find_removable(slot_size)
        if segment is not None and segment.taken_bytes > _MAX_MOVED_PER_CALL:
            self._requested_sizes.add(slot_size)
            return False
        return segment is not None and self._remove_with_moves(segment)

    def reclaim_segments(self) -> None:
        """Remove the segments that a spill would have had to wait too long for."""
        while self._requested_sizes and self._may_continue():
            slot_size = self._requested_sizes.pop()
            with self._reclaiming:
                segment = self._find_removable(slot_size)
            if segment is not None:
                self._remove_with_moves(segment)

    def _find_removable(self, slot_size: int) -> Segment | None:
        """Find a segment of another slot size whose pages all fit in other segments.

        Evicts pages of the other size as long as they are the coldest. Returns None if the pages of
        this size are colder.
        """
        others = [s for s in self._catalog.segments if s.slot_size != slot_size]
        empty = next(filter(_is_empty, others), None)
        if empty is not None or not others:
            return empty
        while (size := self._coldest_size()) is not None and size != slot_size:
            cheapest = self._cheapest_to_empty(s for s in others if s.slot_size == size)
            if cheapest is None:
                return None
            if not cheapest.excess:
                return cheapest.segment
            if not self._evict(size, min(cheapest.excess, _TRIM_BATCH), must=False):
                return None
        return None

    def _coldest_size(self) -> int | None:
        """Return the slot size of the coldest page. Returns None if no page can be evicted."""
        pages = len(self._catalog.index)
        ranks = {
            size: rank
            for size in list(self._catalog.segments.by_slot_size)
            if not self._are_all_pending(size)
            and (rank := self._victims(size).peek(pages)) is not None
        }
        return min(ranks, key=ranks.__getitem__, default=None)

    def _are_all_pending(self, slot_size: int) -> bool:
        """Return whether all pages of a size are pending upload, so that a scan would find none."""
        pending = self._catalog.pending_by_segment
        segments = self._catalog.segments.of_size(slot_size)
        return all(pending[s.number] >= len(s.slots) - s.slots.free for s in segments)

    def _cheapest_to_empty(self, segments: Iterable[Segment]) -> _EmptyingCost | None:
        """Return the segment that loses the fewest bytes when emptied, then moves the fewest.

        Returns None if every segment has pages that are pending upload.
        """
        pending, free = self._catalog.pending_by_segment, self._catalog.segments.free_slots
        free_by_size = {size: free(size) for size in list(self._catalog.segments.by_slot_size)}
        costs = []
        for segment in segments:
            if not pending[segment.number]:
                taken = len(segment.slots) - segment.slots.free
                elsewhere = free_by_size[segment.slot_size] - segment.slots.free
                costs.append(_EmptyingCost(segment, max(taken - elsewhere, 0)))
        return min(
            costs,
            key=lambda v: (v.excess * v.segment.slot_size, v.segment.taken_bytes, v.segment.number),
            default=None,
        )

    def _remove_with_moves(self, segment: Segment, until: float = math.inf) -> bool:
        """Move a segment's pages to other segments, then remove its file.

        Returns False if some pages cannot be moved now, or if `until` has passed.
        """
        segment.retiring = True
        try:
            for first in range(0, len(segment.slots), _MOVE_BATCH):
                if not self._may_continue(until):
                    return False
                with self._reclaiming:
                    slots = range(first, min(first + _MOVE_BATCH, len(segment.slots)))
                    if not self._move(segment, slots):
                        return False
            with self._reclaiming:
                return self._remove_segment(segment)
        finally:
            segment.retiring = False

    def _move(self, segment: Segment, slots: range) -> bool:
        return self._mover.move(segment, slots, self._replace_victims)

    def _replace_victims(self, moved: Mapping[int, int]) -> None:
        for victims in self._victims_of.values():
            victims.replace(moved)

    def _remove_segment(self, segment: Segment) -> bool:
        """Remove a segment's file. Returns False if the segment is not empty.

        Raises `OSError` if the file cannot be removed. The segment is then used again.
        """
        catalog = self._catalog
        with catalog.lock:
            if not _is_empty(segment):
                return False
            # Retire it first, so that no spill reserves its slots.
            catalog.segments.discard(segment)
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
        """Evict up to `count` of the coldest pages of a slot size (None for all sizes).

        Returns how many were evicted. With `must`, evicts pages of chains that are being spilled if
        there are no others.
        """
        evicted, pages = 0, len(self._catalog.index)
        self._catalog.order.adapt(pages)
        while evicted < count:
            victims = self._victims(slot_size).take(pages, count - evicted)
            if not victims:
                break
            evicted += self._drop(victims, self._catalog.order.rank)
        if must and not evicted:
            # Choose by age, because the newest chain is the one being spilled, even if its end has
            # the lowest rank.
            coldest = self._catalog.order.coldest(
                self._entries(slot_size), self._is_evictable_during_spill, count, by_age=True
            )
            evicted = self._drop(coldest, self._catalog.order.tick)
        return evicted

    def _evict_exempt(self, count: int) -> int:
        """Evict the coldest pages even if they are exempt, because the capacity matters more."""
        chunks = self._chunks(self._catalog.segments)
        coldest = self._catalog.order.coldest(chunks, self._is_evictable_if_exempt, count)
        return self._drop(coldest, self._catalog.order.rank)

    def _drop(self, victims: list[tuple[int, int]], rank: Callable[[int], int]) -> int:
        self._catalog.remember_evicted(entry for _, entry in victims)
        dropped = self._catalog.evict(victims, rank)
        self.evicted += dropped
        return dropped

    def _victims(self, slot_size: int | None) -> Victims:
        if slot_size not in self._victims_of:
            self._victims_of[slot_size] = Victims(
                self._catalog.order,
                partial(self._entries, slot_size),
                self._is_evictable,
                max_batch=_MAX_VICTIMS_PER_SCAN if slot_size else None,
            )
        return self._victims_of[slot_size]

    def _entries(self, slot_size: int | None) -> Iterator[Sequence[int]]:
        if self._is_nothing_evictable():
            return iter(())  # Otherwise, every spill would scan all entries in vain.
        segments = self._catalog.segments
        return self._chunks(segments.of_size(slot_size) if slot_size else segments)

    def _chunks(self, segments: Iterable[Segment]) -> Iterator[Sequence[int]]:
        for segment in segments:
            for first in range(0, len(segment.slots), _SCAN_CHUNK):
                yield segment.slots.entries[first : first + _SCAN_CHUNK]

    def _is_nothing_evictable(self) -> bool:
        """Return whether every page is pending upload or exempt from eviction."""
        index, pending, exempt = self._catalog.index, self._catalog.pending, self._catalog.exempt
        if len(pending) + len(exempt) < len(index) or len(exempt) > len(index):
            # With more exempt keys than pages, a scan of all pages is faster than this check.
            return False
        entries = (index.find(key) for key in exempt)
        others = sum(entry is not None and entry not in pending for entry in entries)
        return len(pending) + others >= len(index)

    def _is_evictable(self, entry: int) -> bool:
        return not self._catalog.order.is_being_spilled(entry) and self._is_evictable_during_spill(
            entry
        )

    def _is_evictable_during_spill(self, entry: int) -> bool:
        return self._is_evictable_if_exempt(entry) and not self._catalog.is_exempt(entry)

    def _is_evictable_if_exempt(self, entry: int) -> bool:
        catalog = self._catalog
        return (
            entry not in catalog.pending
            and not catalog.is_pinned(entry)
            and catalog.index.key(entry) is not None
        )


def _is_empty(segment: Segment) -> bool:
    return segment.slots.free == len(segment.slots)
