"""Loads: pin the slots, read them, believe only what the footer and the checksum confirm."""

from collections.abc import Sequence

from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult
from memkv_sglang.tiers.nvme.catalog import Catalog
from memkv_sglang.tiers.nvme.disk.base import OutOfTimeError
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor, Move
from memkv_sglang.tiers.nvme.faults import FaultLog, WriteGate
from memkv_sglang.tiers.nvme.quarantine import Quarantine
from memkv_sglang.tiers.nvme.segment import Place
from memkv_sglang.tiers.nvme.transfer import Run, holds_page, into_runs, read_run

IN_FLIGHT = 16 << 20
"""Bytes that a load asks of the disk at a time: what comes last is checked while the disk idles."""


class Loader:
    """Fills pages. See `load`."""

    def __init__(
        self,
        catalog: Catalog,
        movers: IoExecutor,
        quarantine: Quarantine,
        gate: WriteGate,
        faults: FaultLog,
    ) -> None:
        """Read with `movers`; copies that disagree go to `quarantine`."""
        self.corrupt = 0
        """Pages that disagreed with their key, length or checksum."""
        self._catalog = catalog
        self._movers = movers
        self._quarantine = quarantine
        self._gate = gate
        self._faults = faults

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Fill pages as `Tier.fetch` does; none is skipped."""
        pinned = self._catalog.pin(page.key for page in pages)
        try:
            outcomes = self._fetch(pages, pinned, deadline)
            for i, (page, entry) in enumerate(zip(pages, pinned, strict=True)):
                if outcomes[i].result is LoadResult.CORRUPT and entry is not None:
                    is_corrupt = self.set_aside(page.key, entry)
                    outcomes[i] = Fetched(LoadResult.CORRUPT if is_corrupt else LoadResult.FAILED)
        finally:
            self._catalog.unpin(pinned)
        return outcomes

    def _fetch(
        self, pages: Sequence[Page], pinned: Sequence[int | None], deadline: float
    ) -> list[Fetched]:
        outcomes = [Fetched(LoadResult.MISSING)] * len(pages)
        places: dict[int, Place] = {}
        for i, (page, entry) in enumerate(zip(pages, pinned, strict=True)):
            # A request for another length is at fault itself: the page stays for the others.
            if entry is not None and self._catalog.index.lengths[entry] == page.length:
                places[i] = self._catalog.place(entry)

        runs = into_runs(places, self._movers.depth)
        moves = (self._read(run, pages) for run in runs)
        moved = self._movers.run(moves, deadline, IN_FLIGHT)
        for run, run_outcomes in zip(runs, moved, strict=True):
            for member, fetched in zip(run.members, run_outcomes, strict=True):
                outcomes[member] = fetched
        return outcomes

    def _read(self, run: Run, pages: Sequence[Page]) -> Move[list[Fetched]]:
        try:
            with self._movers.scratches.lend() as scratch:
                checksums = yield from read_run(run, pages, scratch)
        except OutOfTimeError:
            return [Fetched(LoadResult.FAILED)] * len(run.members)
        except (OSError, EOFError) as error:
            if len(run.members) > 1:  # one bad sector, or the file's end: save the other pages
                outcomes: list[Fetched] = []
                for i, member in enumerate(run.members):
                    single = Run(run.segment, run.first + i, [member])
                    outcomes += yield from self._read(single, pages)
                return outcomes
            if isinstance(error, EOFError):
                return [Fetched(LoadResult.CORRUPT)]
            self._faults.report("disk read failed", path=str(run.segment.path), error=str(error))
            return [Fetched(LoadResult.FAILED)]
        return [
            Fetched(LoadResult.LOADED if checksum else LoadResult.CORRUPT, checksum)
            for checksum in checksums
        ]

    def set_aside(self, key: PageKey, entry: int) -> bool:
        """Keep a copy of a pinned page's slot and forget the page; False if it is intact after all.

        It is read once more, into memory of one's own: a client that writes into its buffers during
        a load makes any page look corrupt.
        """
        fields = {"namespace": key.namespace.hex(), "hash": key.hash.hex()}
        place = self._catalog.place(entry)
        slot = _read_slot(place)
        if slot is not None and holds_page(slot, key, self._catalog.index.lengths[entry]):
            self._faults.report("page intact, but not in the memory it was loaded into", **fields)
            return False
        self.corrupt += 1
        copy = self._quarantine.keep(key, place, slot) if slot is not None else None
        self._faults.report("page corrupt, set aside", **fields, copy=str(copy))
        try:
            self._catalog.drop([entry])
        except OSError as error:
            self._gate.close(error)
        return True


def _read_slot(place: Place) -> memoryview | None:
    """Return what lies in a slot, footer included; None if it cannot be read."""
    content = aligned_memory(place.segment.slot_size)
    try:
        place.segment.read([content], place.slot).carry_out()
    except (OSError, EOFError):
        return None
    return content
