"""Load pages: pin their slots, read them, and verify footers and checksums."""

from collections.abc import Sequence

from memkv_sglang.page import Page, PageKey
from memkv_sglang.tiers.base import Fetched, LoadResult
from memkv_sglang.tiers.nvme.catalog import Catalog
from memkv_sglang.tiers.nvme.disk.base import OutOfTimeError
from memkv_sglang.tiers.nvme.disk.direct_io import aligned_memory
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor, IoTask
from memkv_sglang.tiers.nvme.faults import FaultLog, WriteGate
from memkv_sglang.tiers.nvme.quarantine import Quarantine
from memkv_sglang.tiers.nvme.segment import Place
from memkv_sglang.tiers.nvme.transfer import Run, holds_page, into_runs, read_run

IN_FLIGHT = 16 << 20
"""Maximum bytes that a load keeps in flight. The disk is idle while the last of them are verified.
"""


class Loader:
    """Reads pages from disk."""

    def __init__(
        self,
        catalog: Catalog,
        executor: IoExecutor,
        quarantine: Quarantine,
        gate: WriteGate,
        faults: FaultLog,
    ) -> None:
        """Read through `executor`. Copy corrupt pages to `quarantine`."""
        self.corrupt = 0
        """Number of pages found corrupt so far, because their key, length or checksum did not
        match."""
        self._catalog = catalog
        self._executor = executor
        self._quarantine = quarantine
        self._gate = gate
        self._faults = faults

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Load pages; see `Tier.fetch`. Never skips a page."""
        pinned = self._catalog.pin(page.key for page in pages)
        try:
            outcomes = self._fetch(pages, pinned, deadline)
            for i, (page, entry) in enumerate(zip(pages, pinned, strict=True)):
                if outcomes[i].result is LoadResult.CORRUPT and entry is not None:
                    is_corrupt = self.quarantine_page(page.key, entry)
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
            # If the length differs, the request is wrong, so the page is kept.
            if entry is not None and self._catalog.index.lengths[entry] == page.length:
                places[i] = self._catalog.place(entry)

        runs = into_runs(places, self._executor.depth)
        tasks = (self._read(run, pages) for run in runs)
        results = self._executor.run(tasks, deadline, IN_FLIGHT)
        for run, run_outcomes in zip(runs, results, strict=True):
            for member, fetched in zip(run.members, run_outcomes, strict=True):
                outcomes[member] = fetched
        return outcomes

    def _read(self, run: Run, pages: Sequence[Page]) -> IoTask[list[Fetched]]:
        try:
            with self._executor.scratches.borrow() as scratch:
                checksums = yield from read_run(run, pages, scratch)
        except OutOfTimeError:
            return [Fetched(LoadResult.FAILED)] * len(run.members)
        except (OSError, EOFError) as error:
            # A sector is bad or the file was truncated. Try each page separately.
            if len(run.members) > 1:
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

    def quarantine_page(self, key: PageKey, entry: int) -> bool:
        """Copy a pinned page's slot to the quarantine and drop the page.

        First reads the page again, into memory of the agent, because a page also looks corrupt if a
        client writes to its buffers during the load. Returns False if the page is intact.
        """
        fields = {"namespace": key.namespace.hex(), "hash": key.hash.hex()}
        place = self._catalog.place(entry)
        slot = _read_slot(place)
        if slot is not None and holds_page(slot, key, self._catalog.index.lengths[entry]):
            self._faults.report("page intact on disk but not in the client's memory", **fields)
            return False
        self.corrupt += 1
        copy = self._quarantine.save(key, place, slot) if slot is not None else None
        self._faults.report("corrupt page quarantined", **fields, copy=str(copy))
        try:
            self._catalog.drop([entry])
        except OSError as error:
            self._gate.close(error)
        return True


def _read_slot(place: Place) -> memoryview | None:
    """Return the content of a slot, including the footer. Returns None if it cannot be read."""
    content = aligned_memory(place.segment.slot_size)
    try:
        place.segment.read([content], place.slot).execute()
    except (OSError, EOFError):
        return None
    return content
