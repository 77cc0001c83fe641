"""Choose the disk of each new page."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from memkv_sglang.page import PageKey
from memkv_sglang.tiers.disks.disk import Disk
from memkv_sglang.tiers.eviction import PolicyChooser
from memkv_sglang.tiers.nvme import NvmeTier


class OpenDisk(NamedTuple):
    """A disk during one call. If it is closed meanwhile, the call fails on it."""

    disk: Disk
    tier: NvmeTier


class Share(NamedTuple):
    """The pages of a call that are on one disk, by their positions in the call."""

    on: OpenDisk
    members: list[int]


class Placement:
    """Sends new pages to the disks in turn. Thread-safe.

    Every disk gets the same share of every chain, so a load keeps all disks equally busy. It also
    means that the oldest pages of all disks have about the same age, which keeps chains whole: if
    the hash decided, some disks would evict pages whose descendants stay on others.
    """

    def __init__(self, chooser: PolicyChooser) -> None:
        """Announce new pages to `chooser`, which the disks share."""
        self._chooser = chooser
        self._turn = 0
        self._placing: dict[PageKey, OpenDisk] = {}
        """New pages that are being spilled, so that concurrent calls store each of them only once.
        """
        self._lock = threading.Lock()

    @contextmanager
    def place(
        self,
        keys: Sequence[PageKey],
        takers: Sequence[OpenDisk],
        holders: Callable[[], list[OpenDisk | None]],
    ) -> Iterator[list[OpenDisk | None]]:
        """Choose a disk for each page that is spilled in the `with` block.

        A page that is already stored stays on its disk, which `holders` names. Other pages go to
        the disks in `takers`; if there are none, their disk is None.
        """
        new: list[PageKey] = []
        with self._lock:
            places = holders()
            for i, key in enumerate(keys):
                if places[i] is None:
                    if (placed := self._placing.get(key)) not in takers and takers:
                        placed = self._placing[key] = takers[self._turn % len(takers)]
                        self._turn += 1
                        new.append(key)
                    places[i] = placed if takers else None
        self._chooser.announce(new)
        try:
            yield places
        finally:
            with self._lock:
                for key in new:
                    self._placing.pop(key, None)


def shares(places: Sequence[OpenDisk | None]) -> list[Share]:
    """Group the positions of `places` by disk."""
    found: dict[OpenDisk, Share] = {}
    for i, on in enumerate(places):
        if on is not None:
            found.setdefault(on, Share(on, [])).members.append(i)
    return list(found.values())
