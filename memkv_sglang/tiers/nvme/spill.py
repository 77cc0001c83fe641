"""Spills: reserve slots, write them, and only then make the pages known."""

import time
from collections.abc import Sequence

from memkv_sglang.page import ChangedPageError, Page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme.catalog import Catalog, NewPage
from memkv_sglang.tiers.nvme.disk.base import OutOfTimeError
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor, Move
from memkv_sglang.tiers.nvme.faults import WriteGate
from memkv_sglang.tiers.nvme.footer import slot_size_of
from memkv_sglang.tiers.nvme.segment import Place
from memkv_sglang.tiers.nvme.space_reclaimer import SpaceReclaimer
from memkv_sglang.tiers.nvme.transfer import Run, into_runs, write_run


class Spiller:
    """Stores pages. See `spill`."""

    def __init__(
        self, catalog: Catalog, room: SpaceReclaimer, movers: IoExecutor, gate: WriteGate
    ) -> None:
        """Write with `movers` while `gate` is open."""
        self._catalog = catalog
        self._room = room
        self._movers = movers
        self._gate = gate

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Store pages as `Tier.spill` has it; those behind the first not stored share its fate."""
        if time.monotonic() >= deadline:
            return [SpillResult.FAILED] * len(pages)
        # Pinned, so that the call does not evict the chain's begin to make room for its end.
        pinned = self._catalog.pin(page.key for page in pages)
        try:
            missing = {p.key: p for p, entry in zip(pages, pinned, strict=True) if entry is None}
            stored, failure = self._store(list(missing.values()), deadline)
            if len(missing) < len(pages):
                self._touch(pages)
        finally:
            self._catalog.unpin(pinned)
        by_key = dict(zip(missing, stored, strict=False))
        results = [by_key.pop(page.key, SpillResult.PRESENT) for page in pages]
        if len(stored) < len(missing):
            first = list(missing)[len(stored)]
            kept = next(i for i, page in enumerate(pages) if page.key == first)
            results[kept:] = [failure] * (len(pages) - kept)
        return results

    def _touch(self, pages: Sequence[Page]) -> None:
        """Rank the pages as one use of a chain: new ones may come before or after old ones."""
        find = self._catalog.index.find
        entries = [entry for page in pages if (entry := find(page.key)) is not None]
        self._catalog.order.touch(entries)

    def _store(
        self, pages: Sequence[Page], deadline: float
    ) -> tuple[list[SpillResult], SpillResult]:
        """Store pages that are not there, of different keys.

        Returns the results of those from the first on that are there now, and the result of the
        others.
        """
        if not pages:
            return [], SpillResult.FAILED
        places: list[Place] = []
        try:
            failure = self._reserve(pages, places, deadline)
            ticks = range(first := self._catalog.order.take(len(places)), first + len(places))
            new = [
                NewPage(page.key, place, page.length, tick)
                for page, place, tick in zip(pages, places, reversed(ticks), strict=False)
            ]
            written = self._write(pages, new, deadline)
            fresh = self._catalog.publish(new[:written])
            if fresh:
                self._gate.succeed()
            del places[:written]
        except OSError as error:
            self._gate.close(error)
            return [], SpillResult.FAILED
        finally:
            self._catalog.release(places)
        if places:
            failure = SpillResult.FAILED
        stored = [SpillResult.STORED if is_fresh else SpillResult.PRESENT for is_fresh in fresh]
        return stored, failure

    def _reserve(self, pages: Sequence[Page], places: list[Place], deadline: float) -> SpillResult:
        """Add a slot for each page from the first on; returns the result of those without one."""
        if not self._gate.is_open:
            return SpillResult.REFUSED
        begin = 0
        while begin < len(pages):
            slot_size = slot_size_of(pages[begin].length)
            end = begin
            while end < len(pages) and slot_size_of(pages[end].length) == slot_size:
                end += 1
            if not self._catalog.segments.accepts(slot_size):
                return SpillResult.REFUSED
            while len(places) < end:
                if time.monotonic() >= deadline:
                    return SpillResult.FAILED
                found = self._catalog.reserve(slot_size, end - len(places))
                places += found
                if not found and not self._room.make(slot_size, end - len(places)):
                    self._gate.refuse(self._room.why_none())
                    return SpillResult.REFUSED
            begin = end
        return SpillResult.REFUSED

    def _write(self, pages: Sequence[Page], new: Sequence[NewPage], deadline: float) -> int:
        """Write pages to their slots, return how many from the first on are on disk."""
        ticks = [page.tick for page in new]

        def write(run: Run) -> Move[bool]:
            if time.monotonic() >= deadline:  # before the checksums
                return False
            try:
                with self._movers.scratches.lend() as scratch:
                    yield from write_run(run, pages, ticks, scratch)
            except (OutOfTimeError, ChangedPageError):
                return False
            except OSError as error:
                self._gate.close(error)
                return False
            return True

        places = {i: page.place for i, page in enumerate(new)}
        runs = into_runs(places, self._movers.depth)
        done = self._movers.run(map(write, runs), deadline)
        failed = [min(run.members) for run, is_done in zip(runs, done, strict=True) if not is_done]
        return min(failed, default=len(new))
