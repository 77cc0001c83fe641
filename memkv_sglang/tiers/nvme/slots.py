"""The slots of a segment, and the index entries in them."""

from array import array

NO_ENTRY = 0xFFFF_FFFF
"""Marks a slot that is free, or that is reserved for a page whose write is in progress."""


class SlotMap:
    """Tracks which slots of one segment are taken. The caller must hold the catalog's lock."""

    __slots__ = ("_taken", "entries", "free")

    def __init__(self, count: int) -> None:
        """Create a map of `count` free slots."""
        self.entries = array("I", [NO_ENTRY]) * count
        """Index entry by slot."""
        self.free = count
        self._taken = bytearray(count)

    def __len__(self) -> int:
        return len(self._taken)

    def is_taken(self, slot: int) -> bool:
        """Return whether the slot holds a page or is reserved for one."""
        return self._taken[slot] != 0

    def find_run(self, count: int) -> int:
        """Return the first of `count` consecutive free slots; -1 if there are none."""
        return self._taken.find(bytes(count)) if self.free >= count else -1

    def take(self, first: int, count: int = 1) -> None:
        """Reserve free slots."""
        self._taken[first : first + count] = b"\1" * count
        self.free -= count

    def release(self, slot: int) -> None:
        """Make a taken slot free."""
        self._taken[slot] = 0
        self.entries[slot] = NO_ENTRY
        self.free += 1
