"""Spill pages: reserve slots, write them, then publish the pages in the catalog."""

import time
from collections.abc import Sequence

from memkv_sglang.page import ChangedPageError, Page
from memkv_sglang.tiers.base import SpillResult
from memkv_sglang.tiers.nvme.catalog import Catalog, NewPage
from memkv_sglang.tiers.nvme.disk.base import OutOfTimeError
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor, IoTask
from memkv_sglang.tiers.nvme.faults import WriteGate
from memkv_sglang.tiers.nvme.footer import slot_size_of
from memkv_sglang.tiers.nvme.segment import Place
from memkv_sglang.tiers.nvme.space_reclaimer import SpaceReclaimer
from memkv_sglang.tiers.nvme.transfer import Run, into_runs, write_run


class Spiller:
    """Writes pages to disk."""

    def __init__(
        self, catalog: Catalog, reclaimer: SpaceReclaimer, executor: IoExecutor, gate: WriteGate
    ) -> None:
        """Write through `executor` while `gate` is open."""
        self._catalog = catalog
        self._reclaimer = reclaimer
        self._executor = executor
        self._gate = gate

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Store pages; see `Tier.spill`. All pages after one that failed get its result."""
        if time.monotonic() >= deadline:
            return [SpillResult.FAILED] * len(pages)
        # Pin the stored pages, or the call might evict the start of the chain to store its end.
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
            first_failed = list(missing)[len(stored)]
            failed_at = next(i for i, page in enumerate(pages) if page.key == first_failed)
            results[failed_at:] = [failure] * (len(pages) - failed_at)
        return results

    def _touch(self, pages: Sequence[Page]) -> None:
        """Rank the pages as one use of a chain, because new pages may come before old ones."""
        find = self._catalog.index.find
        entries = [entry for page in pages if (entry := find(page.key)) is not None]
        self._catalog.order.touch(entries)

    def _store(
        self, pages: Sequence[Page], deadline: float
    ) -> tuple[list[SpillResult], SpillResult]:
        """Store missing pages, whose keys are distinct.

        Returns the results of the leading pages that are now stored, and one result for all others.
        """
        if not pages:
            return [], SpillResult.FAILED
        places: list[Place] = []
        try:
            failure = self._reserve(pages, places, deadline)
            first = self._catalog.order.reserve_ticks(len(places))
            ticks = range(first, first + len(places))
            new = [
                NewPage(page.key, place, page.length, tick)
                for page, place, tick in zip(pages, places, reversed(ticks), strict=False)
            ]
            written = self._write(pages, new, deadline)
            fresh = self._catalog.publish(new[:written])
            if fresh:
                self._gate.record_success()
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
        """Append a slot for each page, in order; return the result of pages left without one."""
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
                if not found and not self._reclaimer.reclaim_slots(slot_size, end - len(places)):
                    self._gate.record_refusal(self._reclaimer.refusal_reason())
                    return SpillResult.REFUSED
            begin = end
        return SpillResult.REFUSED

    def _write(self, pages: Sequence[Page], new: Sequence[NewPage], deadline: float) -> int:
        """Write the pages to their slots. Returns how many leading pages are on disk."""
        ticks = [page.tick for page in new]

        def write(run: Run) -> IoTask[bool]:
            if time.monotonic() >= deadline:  # Check the deadline before computing checksums.
                return False
            try:
                with self._executor.scratches.borrow() as scratch:
                    yield from write_run(run, pages, ticks, scratch)
            except (OutOfTimeError, ChangedPageError):
                return False
            except OSError as error:
                self._gate.close(error)
                return False
            return True

        places = {i: page.place for i, page in enumerate(new)}
        runs = into_runs(places, self._executor.depth)
        done = self._executor.run(map(write, runs), deadline)
        failed = [min(run.members) for run, is_done in zip(runs, done, strict=True) if not is_done]
        return min(failed, default=len(new))
