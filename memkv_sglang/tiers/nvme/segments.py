"""All segments of a directory: which there are, how many more may be made, and their free slots."""

import errno
import logging
import os
import re
import resource
import time
from collections.abc import Iterator

from memkv_sglang.tiers.nvme.budget import JOURNAL_BYTES_PER_SLOT, divide
from memkv_sglang.tiers.nvme.files import UNFINISHED_SUFFIX, Folder
from memkv_sglang.tiers.nvme.mending import Mended, mend
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
"""At least so many segments share the capacity, so that several slot sizes can."""

RUN_SIZE = (2 << 20) + (1 << 16)
"""Bytes of consecutive slots that one system call moves at most: about two megabytes of content and
its footers. Less costs calls, more costs overlap between checksums and the disk."""

WRITES_LIMIT = 5.0
"""Seconds that the start waits for requests that an earlier agent still has on the disk."""

_SMALLEST_PART = 4
"""A segment is made smaller to fit what capacity is left, but not below this part of full size."""

_DESCRIPTORS_LEFT = 256
"""Descriptors that segments leave to the rest of the process, or a quarter where there are few."""

_NAME = re.compile(r"\d{8}\.seg")
_UNFINISHED_NAME = re.compile(_NAME.pattern + re.escape(UNFINISHED_SUFFIX))
_NO_SEGMENT = (FileNotFoundError, IsADirectoryError)
_log = logging.getLogger(__name__)


class Segments:
    """Not thread-safe: callers hold the catalog's lock, but for making and removing files."""

    def __init__(
        self,
        folder: Folder,
        capacity: int,
        segment_size: int,
        *,
        direct: bool,
        keep_free: int = 0,
    ) -> None:
        """Begin without segments; `open_all` finds those that are there.

        `capacity` is the whole tier's; segments take their part of it. `keep_free` bytes of the
        file system are left to others.
        """
        self.by_number: dict[int, Segment] = {}
        self.by_slot_size: dict[int, list[Segment]] = {}
        self.total = 0
        """Bytes of all segment files."""
        self.taken = 0
        """Bytes of all slots that are taken."""
        self.unopened: set[int] = set()
        """Numbers of files that the disk did not let be opened; they may well be whole."""
        self.unusable_bytes = 0
        """Bytes on disk of files that are named as segments but were not opened."""
        self._folder = folder
        self._capacity = divide(capacity).segments
        self._segment_size = segment_size
        self._slots = 0
        self._direct = direct
        self._keep_free = keep_free
        self._next_number = 0

    def open_all(self) -> None:
        """Open every segment file; leave foreign and damaged files alone, with a line for each.

        Waits `WRITES_LIMIT` for requests of an earlier agent, and leaves alone what has some then.
        Files named as segments count against the capacity, whatever they are; others do not.
        Raises `OSError`.
        """
        refused: list[OSError] = []
        deadline = time.monotonic() + WRITES_LIMIT
        for name in self._folder.names():
            path = str(self._folder.path / name)
            if _UNFINISHED_NAME.fullmatch(name) and self._folder.is_file(name):
                self._folder.remove(name)
            elif not _NAME.fullmatch(name):
                _log.warning("foreign file left alone", extra={"fields": {"path": path}})
            else:
                try:
                    self._open(name, deadline)
                except (DamagedSegmentError, *_NO_SEGMENT) as error:
                    fields = {"path": path, "error": str(error)}
                    _log.warning("segment left alone", extra={"fields": fields})
                    self.unusable_bytes += self._folder.disk_usage([name])
                except OSError as error:
                    refused.append(error)
                    self.unopened.add(int(name.removesuffix(".seg")))
                    self.unusable_bytes += self._folder.disk_usage([name])
        if refused:
            reason = {"segments": len(refused), "error": str(refused[0])}
            _log.error("segments cannot be opened", extra={"fields": reason})
        if self.unusable_bytes:
            stray = {"path": str(self._folder.path), "bytes": self.unusable_bytes}
            _log.warning("files that serve no pages take capacity", extra={"fields": stray})

    def _open(self, name: str, deadline: float) -> None:
        try:
            segment = self._open_intact(name, deadline)
        except LostHeaderError:
            mended = mend(self._folder, name)
            if mended is Mended.NOTHING:
                raise
            path = {"path": str(self._folder.path / name)}
            if mended is Mended.EMPTY:
                self._folder.remove(name)
                _log.warning("segment without content removed", extra={"fields": path})
                return
            segment = self._open_intact(name, deadline)
            _log.warning("segment header restored from its pages", extra={"fields": path})
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
        """Raise `OSError` if another segment would leave too few descriptors to clients."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        next_descriptor = os.dup(self._folder.descriptor)
        os.close(next_descriptor)
        if next_descriptor >= limit - min(_DESCRIPTORS_LEFT, limit // 4):
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}; raise `ulimit -n`")

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self.by_number.values()))

    def orphans(self) -> list[str]:
        """Return the names of files beside the segments that are none of them."""
        own = {segment.path.name for segment in self}
        return sorted(set(self._folder.names()) - own)

    def of_size(self, slot_size: int) -> list[Segment]:
        """Return the segments of a slot size, those that were made first before the others."""
        return list(self.by_slot_size.get(slot_size, ()))

    def free_slots(self, slot_size: int) -> int:
        """Return how many slots of this size can be reserved."""
        segments = self.of_size(slot_size)
        return sum(segment.slots.free for segment in segments if not segment.retiring)

    def accepts(self, slot_size: int) -> bool:
        """Tell whether a slot of this size fits into the largest segment there may be."""
        return (
            HEADER_SIZE + slot_size <= self._segment_size
            and HEADER_SIZE + _cost(slot_size) <= self._capacity
        )

    def spare(self) -> int:
        """Return by how many bytes the files may grow; negative where they have to shrink.

        That is so where the capacity has been lowered, or others have filled the file system.
        A file system that does not tell is one to leave as it is.
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
        """Return how many slots of this size the space that is left may still give."""
        return max(self.spare(), 0) // _cost(slot_size)

    def create(self, slot_size: int) -> Segment | None:
        """Make another segment file, not yet one of these; None where no capacity is left.

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
        """Return the next number that no file has, be it a foreign or a damaged one."""
        number = self._next_number
        exists = self._folder.exists
        while exists(segment_name(number)) or exists(unfinished_name(number)):
            number += 1
        return number

    def add(self, segment: Segment) -> None:
        """Give out the segment's slots from now on."""
        self.by_number[segment.number] = segment
        self.by_slot_size.setdefault(segment.slot_size, []).append(segment)
        self.total += segment.size
        self._slots += len(segment.slots)

    def discard(self, segment: Segment) -> None:
        """Give out none of the segment's slots any more; none is taken. The file stays."""
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
            if segment.retiring:
                continue
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
        place.segment.slots.release(place.slot)
        self.taken -= place.segment.slot_size

    def close(self) -> None:
        """Close every file."""
        for segment in self:
            segment.close()


def _cost(slot_size: int) -> int:
    """Return what a slot takes of the capacity."""
    return slot_size + JOURNAL_BYTES_PER_SLOT
