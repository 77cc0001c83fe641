"""Manage all segments of a directory: open, create and remove them, and reserve their slots."""

import errno
import logging
import os
import re
import resource
import time
from collections.abc import Iterator

from memkv_sglang.tiers.nvme.budget import JOURNAL_BYTES_PER_SLOT, divide
from memkv_sglang.tiers.nvme.files import UNFINISHED_SUFFIX, Folder
from memkv_sglang.tiers.nvme.header_repair import RepairResult, repair_header
from memkv_sglang.tiers.nvme.segment import (
    HEADER_SIZE,
    DamagedSegmentError,
    LostHeaderError,
    Place,
    Segment,
    create_segment,
    open_segment,
    segment_name,
    unfinished_name,
)

SEGMENTS_OF_A_CAPACITY = 16
"""Minimum number of segments in the capacity, so that several slot sizes fit."""

RUN_SIZE = (2 << 20) + (1 << 16)
"""Maximum bytes of consecutive slots per system call: about 2 MiB of content, and footers. With
smaller runs, there are more system calls; with larger ones, checksums and I/O overlap less."""

WRITES_LIMIT = 5.0
"""Seconds that the start waits for I/O that an earlier agent still has in flight."""

_SMALLEST_PART = 4
"""A segment may be smaller to fit in the remaining capacity, but has at least 1/4 of the full size.
"""

_DESCRIPTORS_LEFT = 256
"""File descriptors reserved for the rest of the process. A quarter of them if the limit is low."""

_NAME = re.compile(r"\d{8}\.seg")
_UNFINISHED_NAME = re.compile(_NAME.pattern + re.escape(UNFINISHED_SUFFIX))
_NO_SEGMENT = (FileNotFoundError, IsADirectoryError)
_log = logging.getLogger(__name__)


class Segments:
    """The segments of a directory and their free slots.

    The caller must hold the catalog's lock, except while creating and removing files.
    """

    def __init__(
        self,
        folder: Folder,
        capacity: int,
        segment_size: int,
        *,
        direct: bool,
        keep_free: int = 0,
    ) -> None:
        """Start without segments. `open_all` opens the existing ones.

        `capacity` is that of the tier; segments get a part of it. At least `keep_free` bytes of the
        file system are left unused.
        """
        self.by_number: dict[int, Segment] = {}
        self.by_slot_size: dict[int, list[Segment]] = {}
        self.total = 0
        """Bytes of all segment files."""
        self.taken = 0
        """Bytes of all taken slots."""
        self.unopened: set[int] = set()
        """Numbers of the files that could not be opened because of I/O errors. They may be intact.
        """
        self.unusable_bytes = 0
        """Bytes on disk of files that are named like segments but are not open."""
        self._folder = folder
        self._capacity = divide(capacity).segments
        self._segment_size = segment_size
        self._slots = 0
        self._direct = direct
        self._keep_free = keep_free
        self._next_number = 0

    def open_all(self) -> None:
        """Open every segment file. Skips and logs unknown and damaged files.

        Waits up to `WRITES_LIMIT` for an earlier agent's I/O, then skips files with I/O in flight.
        Skipped files that are named like segments count towards the capacity. Raises `OSError`.
        """
        refused: list[OSError] = []
        deadline = time.monotonic() + WRITES_LIMIT
        for name in self._folder.names():
            path = str(self._folder.path / name)
            if _UNFINISHED_NAME.fullmatch(name) and self._folder.is_file(name):
                self._folder.remove(name)
            elif not _NAME.fullmatch(name):
                _log.warning("ignored an unknown file", extra={"fields": {"path": path}})
            else:
                try:
                    self._open(name, deadline)
                except (DamagedSegmentError, *_NO_SEGMENT) as error:
                    fields = {"path": path, "error": str(error)}
                    _log.warning("ignored a damaged segment", extra={"fields": fields})
                    self.unusable_bytes += self._folder.disk_usage([name])
                except OSError as error:
                    refused.append(error)
                    self.unopened.add(int(name.removesuffix(".seg")))
                    self.unusable_bytes += self._folder.disk_usage([name])
        if refused:
            reason = {"segments": len(refused), "error": str(refused[0])}
            _log.error("cannot open segments", extra={"fields": reason})
        if self.unusable_bytes:
            unusable = {"path": str(self._folder.path), "bytes": self.unusable_bytes}
            _log.warning("unusable segment files take up capacity", extra={"fields": unusable})

    def _open(self, name: str, deadline: float) -> None:
        try:
            segment = self._open_intact(name, deadline)
        except LostHeaderError:
            repair = repair_header(self._folder, name)
            if repair is RepairResult.UNKNOWN:
                raise
            path = {"path": str(self._folder.path / name)}
            if repair is RepairResult.EMPTY:
                self._folder.remove(name)
                _log.warning("removed an empty segment without a header", extra={"fields": path})
                return
            segment = self._open_intact(name, deadline)
            _log.warning("restored a segment header from its pages", extra={"fields": path})
        if segment.intact_slots < len(segment.slots):
            _log.warning("segment was truncated", extra={"fields": {"path": str(segment.path)}})
        self._next_number = max(self._next_number, segment.number + 1)
        self.add(segment)

    def _open_intact(self, name: str, deadline: float) -> Segment:
        self._spare_descriptors()
        return open_segment(
            self._folder,
            name,
            largest=self._capacity,
            direct=self._direct,
            deadline=deadline,
        )

    def _spare_descriptors(self) -> None:
        """Raise `OSError` if another segment would leave too few descriptors for clients."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_descriptor = os.dup(self._folder.descriptor)
        os.close(next_descriptor)
        if next_descriptor >= limit - min(_DESCRIPTORS_LEFT, limit // 4):
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}; raise `ulimit -n`")

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self.by_number.values()))

    def orphans(self) -> list[str]:
        """Return the names of all files in the segments directory that are not open segments."""
        own = {segment.path.name for segment in self}
        return sorted(set(self._folder.names()) - own)

    def of_size(self, slot_size: int) -> list[Segment]:
        """Return the segments of a slot size, oldest first."""
        return list(self.by_slot_size.get(slot_size, ()))

    def free_slots(self, slot_size: int) -> int:
        """Return how many slots of this size can be reserved now."""
        segments = self.of_size(slot_size)
        return sum(segment.slots.free for segment in segments if not segment.retiring)

    def accepts(self, slot_size: int) -> bool:
        """Return whether a slot of this size fits in the largest possible segment."""
        return (
            HEADER_SIZE + slot_size <= self._segment_size
            and HEADER_SIZE + _cost(slot_size) <= self._capacity
        )

    def spare(self) -> int:
        """Return by how many bytes the files may grow. If they have to shrink, it is negative.

        They have to shrink if the capacity was lowered, or if other programs filled the file
        system. If the free space of the file system is unknown, they must not grow.
        """
        journal = self._slots * JOURNAL_BYTES_PER_SLOT
        spare = self._capacity - self.total - journal - self.unusable_bytes
        if not self._keep_free:
            return spare
        try:
            system = os.fstatvfs(self._folder.descriptor)
        except OSError:
            return min(spare, 0)
        return min(spare, system.f_bavail * system.f_frsize - self._keep_free)

    def potential_slots(self, slot_size: int) -> int:
        """Return how many slots of this size fit in the unused capacity."""
        return max(self.spare(), 0) // _cost(slot_size)

    def create(self, slot_size: int) -> Segment | None:
        """Create a segment file, which the caller must `add`. Returns None if no capacity is left.

        Blocks on the disk. Raises `OSError`.
        """
        full = self._usual_slots(slot_size)
        fitting = (self.spare() - HEADER_SIZE) // _cost(slot_size)
        enough = full // _SMALLEST_PART if slot_size in self.by_slot_size else 1
        if fitting < max(enough, 1):
            return None
        self._spare_descriptors()
        number = self._unused_number()
        slots = min(full, fitting)
        segment = create_segment(self._folder, number, slot_size, slots, direct=self._direct)
        self._next_number = number + 1
        return segment

    def _usual_slots(self, slot_size: int) -> int:
        of_file = (self._segment_size - HEADER_SIZE) // slot_size
        part = self._capacity // SEGMENTS_OF_A_CAPACITY
        return max(min(of_file, (part - HEADER_SIZE) // _cost(slot_size)), 1)

    def _unused_number(self) -> int:
        """Return the next number that no file has. Damaged files count."""
        number = self._next_number
        exists = self._folder.exists
        while exists(segment_name(number)) or exists(unfinished_name(number)):
            number += 1
        return number

    def add(self, segment: Segment) -> None:
        """Allow reservations of the segment's slots."""
        self.by_number[segment.number] = segment
        self.by_slot_size.setdefault(segment.slot_size, []).append(segment)
        self.total += segment.size
        self._slots += len(segment.slots)

    def discard(self, segment: Segment) -> None:
        """Stop using a segment without taken slots. The file stays."""
        assert segment.slots.free == len(segment.slots)
        del self.by_number[segment.number]
        self.by_slot_size[segment.slot_size].remove(segment)
        if not self.by_slot_size[segment.slot_size]:
            del self.by_slot_size[segment.slot_size]
        self.total -= segment.size
        self._slots -= len(segment.slots)

    def remove_file(self, segment: Segment) -> None:
        """Remove the file of a segment. Raises `OSError`."""
        self._folder.remove(segment.path.name)

    def reserve(self, slot_size: int, count: int) -> list[Place]:
        """Reserve up to `count` free slots, consecutive ones where possible."""
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
            if segment.retiring:
                continue
            first = segment.slots.find_run(count)
            if first >= 0:
                segment.slots.take(first, count)
                self.taken += count * slot_size
                return [Place(segment, slot) for slot in range(first, first + count)]
        return []

    def take(self, place: Place) -> None:
        """Mark a particular slot as taken, for recovery."""
        place.segment.slots.take(place.slot)
        self.taken += place.segment.slot_size

    def release(self, place: Place) -> None:
        """Free a taken slot."""
        place.segment.slots.release(place.slot)
        self.taken -= place.segment.slot_size

    def close(self) -> None:
        """Close every file."""
        for segment in self:
            segment.close()


def _cost(slot_size: int) -> int:
    """Return the bytes of capacity that a slot takes."""
    return slot_size + JOURNAL_BYTES_PER_SLOT
