"""All segments of a directory: which there are, how many more may be made, and their free slots."""

import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from memkv_sglang.tiers.nvme.segment import (
    HEADER_SIZE,
    UNFINISHED_SUFFIX,
    DamagedSegmentError,
    Place,
    Segment,
    create_segment,
    open_segment,
    segment_path,
    unfinished_path,
)

SEGMENTS_OF_A_CAPACITY = 16
"""At least so many segments share the capacity, so that several slot sizes can."""

RUN_SIZE = (2 << 20) + (1 << 16)
"""Bytes of consecutive slots that one system call moves at most: about two megabytes of content and
its footers. Less costs calls, more costs overlap between checksums and the disk."""

WRITES_LIMIT = 5.0
"""Seconds that the start waits for requests that an earlier agent still has on the disk."""

_SMALLEST_PART = 4
"""A segment is made smaller to fit what capacity is left, but not below this part of full size."""

_NAME = re.compile(r"\d{8}\.seg")
_NO_SEGMENT = (DamagedSegmentError, FileNotFoundError, IsADirectoryError)
_log = logging.getLogger(__name__)


class Segments:
    """Not thread-safe: callers hold the catalog's lock, but for making and removing files."""

    def __init__(
        self,
        directory: Path,
        capacity: int,
        segment_size: int,
        *,
        direct: bool,
        keep_free: int = 0,
    ) -> None:
        """Begin without segments; `open_all` finds those that are there.

        `keep_free` bytes of the file system are left to others.
        """
        self.by_number: dict[int, Segment] = {}
        self.by_slot_size: dict[int, list[Segment]] = {}
        self.total = 0
        """Bytes of all segment files."""
        self.taken = 0
        """Bytes of all slots that are taken."""
        self.unopened: set[int] = set()
        """Numbers of files that the disk did not let be opened; they may well be whole."""
        self._directory = directory
        self._capacity = capacity
        self._largest = min(segment_size, capacity)
        self._usual = min(segment_size, capacity // SEGMENTS_OF_A_CAPACITY)
        self._direct = direct
        self._keep_free = keep_free
        self._next_number = 0

    def open_all(self) -> None:
        """Open every segment file; leave foreign and damaged files alone, with one line each.

        Waits `WRITES_LIMIT` for requests of an earlier agent, and leaves alone what has some then.
        """
        deadline = time.monotonic() + WRITES_LIMIT
        for path in sorted(self._directory.iterdir()):
            if path.name.endswith(f".seg{UNFINISHED_SUFFIX}") and not path.is_dir():
                path.unlink()
            elif not _NAME.fullmatch(path.name):
                _log.warning("foreign file left alone", extra={"fields": {"path": str(path)}})
            else:
                self._open(path, deadline)

    def _open(self, path: Path, deadline: float) -> None:
        try:
            segment = open_segment(path, direct=self._direct, deadline=deadline)
        except (OSError, DamagedSegmentError) as error:
            fields = {"path": str(path), "error": str(error)}
            _log.warning("segment left alone", extra={"fields": fields})
            if not isinstance(error, _NO_SEGMENT):
                self.unopened.add(int(path.stem))
            return
        if segment.intact_slots < len(segment.slots):
            _log.warning("segment was truncated", extra={"fields": {"path": str(path)}})
        self._next_number = max(self._next_number, segment.number + 1)
        self.add(segment)

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self.by_number.values()))

    def orphans(self) -> list[str]:
        """Return the names of files beside the segments that are none of them."""
        own = {segment.path.name for segment in self}
        return sorted({path.name for path in self._directory.iterdir()} - own)

    def of_size(self, slot_size: int) -> list[Segment]:
        """Return the segments of a slot size, those that were made first before the others."""
        return list(self.by_slot_size.get(slot_size, ()))

    def accepts(self, slot_size: int) -> bool:
        """Tell whether a slot of this size fits into the largest segment there may be."""
        return HEADER_SIZE + slot_size <= self._largest

    def spare(self) -> int:
        """Return by how many bytes the files may grow; negative where they have to shrink.

        That is so where the capacity has been lowered, or others have filled the file system.
        A file system that does not tell is one to leave as it is.
        """
        spare = self._capacity - self.total
        if not self._keep_free:
            return spare
        try:
            system = os.statvfs(self._directory)
        except OSError:
            return min(spare, 0)
        return min(spare, system.f_bavail * system.f_frsize - self._keep_free)

    def slots_to_come(self, slot_size: int) -> int:
        """Return how many slots of this size the space that is left may still give."""
        return max(self.spare(), 0) // slot_size

    def create(self, slot_size: int) -> Segment | None:
        """Make another segment file, not yet one of these; None where no capacity is left.

        Blocks on the disk. Raises `OSError`.
        """
        full = max((self._usual - HEADER_SIZE) // slot_size, 1)
        fitting = (self.spare() - HEADER_SIZE) // slot_size
        enough = full // _SMALLEST_PART if slot_size in self.by_slot_size else 1
        if fitting < max(enough, 1):
            return None
        number = self._unused_number()
        segment = create_segment(
            self._directory, number, slot_size, min(full, fitting), direct=self._direct
        )
        self._next_number = number + 1
        return segment

    def _unused_number(self) -> int:
        """Return the next number that no file has, be it a foreign or a damaged one."""
        number = self._next_number
        while (
            segment_path(self._directory, number).exists()
            or unfinished_path(self._directory, number).exists()
        ):
            number += 1
        return number

    def add(self, segment: Segment) -> None:
        """Give out the segment's slots from now on."""
        self.by_number[segment.number] = segment
        self.by_slot_size.setdefault(segment.slot_size, []).append(segment)
        self.total += segment.size

    def discard(self, segment: Segment) -> None:
        """Give out none of the segment's slots any more; none is taken. The file stays."""
        assert segment.slots.free == len(segment.slots)
        del self.by_number[segment.number]
        self.by_slot_size[segment.slot_size].remove(segment)
        if not self.by_slot_size[segment.slot_size]:
            del self.by_slot_size[segment.slot_size]
        self.total -= segment.size

    def reserve(self, slot_size: int, count: int) -> list[Place]:
        """Take up to `count` free slots, consecutive ones as far as there are any."""
        places: list[Place] = []
        longest = max(RUN_SIZE // slot_size, 1)
        run = min(count, longest)
        while run and len(places) < count:
            run = min(run, count - len(places))
            found = self._take_run(slot_size, run)
            if found:
                places += found
            else:
                run //= 2
        return places

    def _take_run(self, slot_size: int, count: int) -> list[Place]:
        for segment in self.by_slot_size.get(slot_size, ()):
            first = segment.slots.find_run(count)
            if first >= 0:
                segment.slots.take(first, count)
                self.taken += count * slot_size
                return [Place(segment, slot) for slot in range(first, first + count)]
        return []

    def take(self, place: Place) -> None:
        """Take one certain slot, as recovery finds it."""
        place.segment.slots.take(place.slot)
        self.taken += place.segment.slot_size

    def release(self, place: Place) -> None:
        """Give a taken slot back."""
        place.segment.slots.give_back(place.slot)
        self.taken -= place.segment.slot_size

    def close(self) -> None:
        """Close every file."""
        for segment in self:
            segment.close()
