"""The tier on this node's disk."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    Fetched,
    LoadResult,
    Lookup,
    PendingPage,
    SpillResult,
    Tier,
    TierError,
    TierUsage,
)
from memkv_sglang.tiers.nvme.budget import divide
from memkv_sglang.tiers.nvme.calls import CallsInFlight
from memkv_sglang.tiers.nvme.catalog import Catalog, CompactionGivenUpError
from memkv_sglang.tiers.nvme.descriptions import Descriptions
from memkv_sglang.tiers.nvme.directory import Directory
from memkv_sglang.tiers.nvme.disk.io_executor import IoExecutor
from memkv_sglang.tiers.nvme.errors import broken
from memkv_sglang.tiers.nvme.faults import FaultLog, WriteGate
from memkv_sglang.tiers.nvme.housekeeping import Housekeeper
from memkv_sglang.tiers.nvme.integrity import disagreements
from memkv_sglang.tiers.nvme.load import Loader
from memkv_sglang.tiers.nvme.quarantine import Quarantine
from memkv_sglang.tiers.nvme.recovery import recover
from memkv_sglang.tiers.nvme.segments import Segments
from memkv_sglang.tiers.nvme.space_reclaimer import SpaceReclaimer
from memkv_sglang.tiers.nvme.spill import Spiller
from memkv_sglang.tiers.nvme.verify import Verifier, VerifyReport

_CLEAR_BATCH = 4096
"""Pages that `clear` forgets at a time, so that spills are not held up for long."""

SHRINK_SECONDS = 5.0
"""How long a start waits for files that are larger than the capacity; the rest is done behind."""

_LOOK_EVERY = 5.0
"""Seconds after which the directory and its file system are looked at again."""

_log = logging.getLogger(__name__)


class NvmeTier(Tier):
    """Pages in slots of preallocated files; has `PendingUploads` and `EvictionExemptions` too.

    `STORED` and `PRESENT` pages survive a kill of the process. Removals do so as well, unless the
    journal is lost: what was removed but not yet written over is then there again.
    """

    name = "nvme"

    def __init__(self, config: NvmeConfig, *, maintain: bool = True) -> None:
        """Open the directory, making it if need be; raises `ConfigError`.

        Without `maintain` no page leaves unasked, even where the files exceed the capacity: whoever
        only looks may have another one set than the agent.
        """
        self._capacity = config.capacity
        self._directory = Directory(config)
        self._segments = Segments(
            self._directory.segments,
            config.capacity,
            config.segment_size,
            direct=self._directory.direct_io,
            keep_free=config.keep_free,
        )
        faults = FaultLog()
        self._gate = WriteGate(faults, self._directory.displacement)
        self._catalog = Catalog(self._segments)
        self._room = SpaceReclaimer(
            self._catalog, config.high_watermark, config.low_watermark, faults
        )
        budget = divide(config.capacity)
        self._descriptions = Descriptions(
            self._directory.namespaces, budget.descriptions, self._catalog.index.namespaces
        )
        quarantine = Quarantine(self._directory.quarantine, budget.quarantine)
        try:
            self._segments.open_all()
            recover(self._catalog, self._directory.root)
        except BaseException as error:  # a signal may end the start here
            self._segments.close()
            self._directory.close()
            if not isinstance(error, OSError):
                raise
            raise broken(self._directory.path, error) from error
        if maintain:
            self._tidy(quarantine)
        self._movers = IoExecutor(
            config.queue_depth, config.io_engine, direct=self._directory.direct_io
        )
        self._loader = Loader(self._catalog, self._movers, quarantine, self._gate, faults)
        self._spiller = Spiller(self._catalog, self._room, self._movers, self._gate)
        self._verifier = Verifier(self._catalog, self._movers, self._loader, self._descriptions)
        self._housekeeper = Housekeeper(
            self._catalog,
            self._room,
            self._gate,
            smallest_journal=budget.journal,
            look_every=_LOOK_EVERY,
        )
        if maintain:
            self._housekeeper.wake()
        else:
            self._housekeeper.close()
        self._calls = CallsInFlight()
        self._keeps_journal = True
        fields = {"directory": config.directory, "pages": len(self._catalog.index)}
        _log.info("nvme tier open", extra={"fields": fields})

    def _tidy(self, quarantine: Quarantine) -> None:
        """Fit everything into the capacity, which may be smaller than it was."""
        try:
            self._room.shrink(time.monotonic() + SHRINK_SECONDS)
        except OSError as error:  # what is there can be loaded all the same
            self._gate.close(error)
        try:
            quarantine.trim()
            self._descriptions.remove_unfinished()
            # Each update of weights leaves a namespace without pages.
            if not self._catalog.is_partial:  # what cannot be opened now may have pages of any
                self._descriptions.remove_all_but(self._catalog.index.namespaces())
        except OSError as error:
            _log.warning("small files left on disk", extra={"fields": {"error": str(error)}})

    @property
    def segments_descriptor(self) -> int:
        """The open directory of the segment files; carries no lock, so that others may keep it."""
        return self._directory.segments_descriptor

    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """Walk the index; page-exact, waits for nothing."""
        entries = self._catalog.walk(chain)
        self._catalog.order.use(chain.namespace, chain.hashes, entries)
        if self._catalog.order.needs_flush:
            self._housekeeper.wake()
        return Lookup(len(entries), complete=True)

    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Ask the index; waits for nothing."""
        find = self._catalog.index.find
        return [find(key) is not None for key in keys]

    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """Read and check the pages, consecutive slots at once; none is skipped."""
        with self._calls.enter() as entered:
            if not entered:
                return [Fetched(LoadResult.FAILED)] * len(pages)
            return self._loader.fetch(pages, deadline)

    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """Write the pages, into consecutive slots as far as there are any."""
        with self._calls.enter() as entered:
            if not entered:
                return [SpillResult.FAILED] * len(pages)
            results = self._spiller.spill(pages, deadline)
            self._housekeeper.wake()
            return results

    def touch(self, chain: Chain) -> None:
        """Walk the index; waits for nothing."""
        self._catalog.order.touch(self._catalog.walk(chain))

    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """There is nothing to do: the index knows."""

    def remove(self, keys: Sequence[PageKey]) -> int:
        """Free the pages' slots, in the journal first."""
        with self._calls.enter() as entered:
            return self._drop_keys(keys) if entered else 0

    def clear(self, namespace: bytes) -> int:
        """Free the slots of all its pages, in batches; the description stays."""
        with self._calls.enter() as entered:
            if not entered:
                return 0
            keys = self._catalog.keys_of(namespace)
            batches = range(0, len(keys), _CLEAR_BATCH)
            return sum(self._drop_keys(keys[i : i + _CLEAR_BATCH]) for i in batches)

    def _drop_keys(self, keys: Sequence[PageKey]) -> int:
        try:
            return self._catalog.drop_keys(keys)
        except OSError as error:
            self._gate.close(error)
            raise TierError(f"the journal takes no more ({error})") from error

    def describe(self, namespace: Namespace) -> None:
        """Write the description, unless it is there."""
        try:
            self._descriptions.keep(namespace)
        except OSError as error:
            raise TierError(f"cannot keep the description ({error})") from error

    def namespaces(self) -> dict[bytes, Namespace]:
        """Read every description."""
        try:
            return self._descriptions.read_all()
        except OSError as error:
            raise TierError(f"cannot read the descriptions ({error})") from error

    def usage(self) -> TierUsage:
        """Count slots, footers included."""
        pages = len(self._catalog.index)
        return TierUsage(pages, self._segments.taken, self._capacity, self._room.evicted)

    @property
    def corrupt(self) -> int:
        """Pages set aside since the tier was opened."""
        return self._loader.corrupt

    def problem(self) -> str:
        """Say why the disk took no pages when it was last asked to."""
        return self._gate.problem and f"the disk takes no pages ({self._gate.problem})"

    def check_integrity(self) -> list[str]:
        """Compare index, slots, marks and counts."""
        return disagreements(self._catalog)

    def close(self, deadline: float = math.inf) -> None:
        """Wait for calls in flight, then write the journal anew with the order of use.

        Where that is not done by the deadline the journal stays as it is.
        """
        if not self._calls.close():
            return
        self._housekeeper.close()
        self._movers.close()
        if self._keeps_journal:
            try:
                self._catalog.compact(lambda: time.monotonic() >= deadline)
            except CompactionGivenUpError:
                _log.info("no time to keep the order of use")
            except OSError as error:  # the journal as it is will do, but for the order of use
                self._gate.close(error)
            self._catalog.journal.close()
        else:
            self._catalog.journal.discard()
        self._segments.close()
        self._directory.close()

    def exempt(self, keys: Collection[PageKey]) -> None:
        """Let none of these be evicted from now on, and only these."""
        self._catalog.kept = keys

    # Upload marks

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """Note in the journal that the pages wait."""
        return self._mark(keys, pending=True)

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """Note in the journal that they wait no more."""
        self._mark(keys, pending=False)
        self._housekeeper.wake()  # they may leave now

    def _mark(self, keys: Sequence[PageKey], *, pending: bool) -> int:
        with self._calls.enter() as entered:
            if entered:
                try:
                    return self._catalog.mark(keys, pending=pending)
                except OSError as error:
                    self._gate.close(error)
        return 0

    def pending(self) -> Iterator[PendingPage]:
        """Yield the pages that wait, those that were marked first before the others."""
        return iter(self._catalog.pending_pages())

    # For `memkv verify`

    def verify(self, repair: bool, progress: Callable[[int, int], None]) -> VerifyReport:
        """Read every page and check it, while other calls go on; blocks for as long as that takes.

        With `repair` the pages that are not intact are set aside and freed. `progress` is called
        with the pages done and their number altogether. Raises `TierError`.
        """
        with self._calls.enter() as entered:
            if not entered:
                raise TierError("the tier is closed")
            try:
                return self._verifier.verify(repair=repair, progress=progress)
            except OSError as error:
                raise TierError(f"cannot read the directory ({error})") from error

    def discard_journal(self) -> None:
        """Let `close` remove the journal, so that the next start makes one from the footers."""
        self._keeps_journal = False
