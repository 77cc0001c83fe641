"""The planner's simulation of the NVMe tier as a contestant of the replay."""

from collections.abc import Sequence

from typing_extensions import override

from benchmarks.trace.peers import Cache
from memkv_sglang.page import PageKey
from memkv_sglang.planning.disk import NAMESPACE, SimulatedDisk, page_hash
from memkv_sglang.tiers.eviction import PolicyChooser

__all__ = ["NAMESPACE", "ProductCache", "ProductDisks"]


class ProductCache(SimulatedDisk, Cache):
    """Makes the decisions of the NVMe tier, page by page."""

    def __init__(self, pages: int) -> None:
        """See `Cache`."""
        SimulatedDisk.__init__(self, pages)

    @override
    def request(self, pages: Sequence[int]) -> int:
        hits = self.lookup(pages)
        self.spill(pages)
        return hits


class ProductDisks:
    """Makes the decisions of an NVMe tier with several disks, which take new pages in turn."""

    def __init__(self, pages: int, disks: int) -> None:
        """Divide `pages` among the disks."""
        self._chooser = PolicyChooser()
        self._disks = [SimulatedDisk(pages // disks, chooser=self._chooser) for _ in range(disks)]
        self._turn = 0

    def request(self, pages: Sequence[int]) -> int:
        """Look up and spill the pages; return how many were hits."""
        places = [next((disk for disk in self._disks if page in disk), None) for page in pages]
        hits = places.index(None) if None in places else len(pages)
        for disk in self._disks:
            disk.lookup(_of(disk, pages[:hits], places))
        new = [i for i, place in enumerate(places) if place is None]
        self._chooser.announce([PageKey(NAMESPACE, page_hash(pages[i])) for i in new])
        for i in new:
            places[i] = self._disks[self._turn % len(self._disks)]
            self._turn += 1
        for disk in self._disks:
            disk.spill(_of(disk, pages, places))
        return hits


def _of(
    disk: SimulatedDisk, pages: Sequence[int], places: Sequence[SimulatedDisk | None]
) -> list[int]:
    """Return the pages that are placed on a disk."""
    return [page for page, place in zip(pages, places, strict=False) if place is disk]
