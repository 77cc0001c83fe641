"""The NVMe tier: stores pages on this node's disk."""

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set

from typing_extensions import override

from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain, Page, PageKey
from memkv_sglang.tiers.base import (
    DiskStatus,
    Fetched,
    LoadResult,
    Lookup,
    PendingPage,
    SpillResult,
    Tier,
    TierError,
    TierUsage,
)
from memkv_sglang.tiers.eviction import PolicyChooser
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
"""Pages per batch that `clear` removes. Small enough that spills do not wait long."""

SHRINK_SECONDS = 5.0
"""Seconds for the start to shrink files to the capacity. The rest is done in the background."""

_CHECK_INTERVAL = 5.0
"""Seconds between checks of the directory and its file system."""

_log = logging.getLogger(__name__)


class NvmeTier(Tier):
    """Stores pages in slots of preallocated files.

    Also implements `PendingUploads` and `EvictionExemptions`. Stored pages survive a kill of the
    process. Removals survive it too, unless the journal is lost; then pages that were removed but
    not yet overwritten reappear.
    """

    name = "nvme"

    def __init__(
        self,
        config: NvmeConfig,
        *,
        maintain: bool = True,
        chooser: PolicyChooser | None = None,
    ) -> None:
        """Open the one directory of `config`, creating it if necessary. Raises `ConfigError`.

        Without `maintain`, nothing is evicted, even if the files exceed the capacity. Commands that
        inspect the directory use this, because their capacity may differ from the agent's. Disks
        that hold pages of the same chains must share the `chooser` of the reuse policy.
        """
        self._capacity = config.capacity
        self._path = config.directory
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
        self._catalog = Catalog(self._segments, chooser)
        self._reclaimer = SpaceReclaimer(
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
        except BaseException as error:  # BaseException covers signals during the start
            self._segments.close()
            self._directory.close()
            if not isinstance(error, OSError):
                raise
            raise broken(self._directory.path, error) from error
        if maintain:
            self._fit_into_capacity(quarantine)
        self._executor = IoExecutor(
            config.queue_depth, config.io_engine, direct=self._directory.direct_io
        )
        self._loader = Loader(self._catalog, self._executor, quarantine, self._gate, faults)
        self._spiller = Spiller(self._catalog, self._reclaimer, self._executor, self._gate)
        self._verifier = Verifier(self._catalog, self._executor, self._loader, self._descriptions)
        self._housekeeper = Housekeeper(
            self._catalog,
            self._reclaimer,
            self._gate,
            smallest_journal=budget.journal,
            check_interval=_CHECK_INTERVAL,
        )
        if maintain:
            self._housekeeper.wake()
        else:
            self._housekeeper.close()
        self._calls = CallsInFlight()
        self._keep_journal = True
        fields = {"directory": config.directory, "pages": len(self._catalog.index)}
        _log.info("nvme tier open", extra={"fields": fields})

    def _fit_into_capacity(self, quarantine: Quarantine) -> None:
        """Shrink all files to the capacity, which may have been lowered."""
        try:
            self._reclaimer.shrink(time.monotonic() + SHRINK_SECONDS)
        except OSError as error:  # The stored pages can still be loaded.
            self._gate.close(error)
        try:
            quarantine.trim()
            self._descriptions.remove_unfinished()
            # Every weight update leaves behind a namespace that will have no pages. Segments that
            # are not open may have pages of any namespace.
            if not self._catalog.is_partial:
                self._descriptions.remove_all_but(self._catalog.index.namespaces())
        except OSError as error:
            _log.warning("cannot remove old files", extra={"fields": {"error": str(error)}})

    @property
    def segments_descriptor(self) -> int:
        """Descriptor of the segments directory without a lock; other processes may keep it."""
        return self._directory.segments_descriptor

    @override
    def lookup(self, chain: Chain, deadline: float) -> Lookup:
        """See `Tier.lookup`. The result is exact. Does not block."""
        entries = self._catalog.walk(chain)
        self._catalog.order.use(chain.namespace, chain.hashes, entries)
        if self._catalog.order.needs_flush:
            self._housekeeper.wake()
        return Lookup(len(entries), complete=True)

    @override
    def present(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """See `Tier.present`. Does not block."""
        find = self._catalog.index.find
        return [find(key) is not None for key in keys]

    @override
    def fetch(self, pages: Sequence[Page], deadline: float) -> list[Fetched]:
        """See `Tier.fetch`. Reads consecutive slots with one system call. Skips no page."""
        with self._calls.enter() as entered:
            if not entered:
                return [Fetched(LoadResult.FAILED)] * len(pages)
            return self._loader.fetch(pages, deadline)

    @override
    def spill(self, pages: Sequence[Page], deadline: float) -> list[SpillResult]:
        """See `Tier.spill`. Writes to consecutive slots where possible."""
        with self._calls.enter() as entered:
            if not entered:
                return [SpillResult.FAILED] * len(pages)
            results = self._spiller.spill(pages, deadline)
            self._housekeeper.wake()
            return results

    @override
    def touch(self, chain: Chain) -> None:
        """See `Tier.touch`. Does not block."""
        self._catalog.order.touch(self._catalog.walk(chain))

    @override
    def invalidate(self, keys: Sequence[PageKey]) -> None:
        """Do nothing: no other node changes this disk."""

    @override
    def remove(self, keys: Sequence[PageKey]) -> int:
        """Remove the pages from the journal, then free their slots."""
        with self._calls.enter() as entered:
            return self._drop_keys(keys) if entered else 0

    @override
    def clear(self, namespace: bytes) -> int:
        """Remove the namespace's pages in batches. Its description stays."""
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
            raise TierError(f"cannot write to the journal ({error})") from error

    @override
    def describe(self, namespace: Namespace) -> None:
        """Write the description unless it is already stored."""
        try:
            self._descriptions.store(namespace)
        except OSError as error:
            raise TierError(f"cannot write the description ({error})") from error

    @override
    def namespaces(self) -> dict[bytes, Namespace]:
        """Read every description."""
        try:
            return self._descriptions.read_all()
        except OSError as error:
            raise TierError(f"cannot read the descriptions ({error})") from error

    @override
    def usage(self) -> TierUsage:
        """Return the pages and the bytes of their slots, including footers."""
        pages = len(self._catalog.index)
        return TierUsage(pages, self._segments.taken, self._capacity, self._reclaimer.evicted)

    @property
    def corrupt(self) -> int:
        """Number of pages found corrupt since the tier was opened."""
        return self._loader.corrupt

    @override
    def problem(self) -> str:
        """Return why the disk did not accept the last spill; empty if it did."""
        return self._gate.problem and f"the disk accepts no pages ({self._gate.problem})"

    @property
    def is_readable(self) -> bool:
        """Whether a segment could be opened, or there is none."""
        return bool(self._segments.by_number) or not self._segments.unopened

    @property
    def accepts_pages(self) -> bool:
        """Whether to attempt spills. False for a while after a failed write."""
        return self._gate.is_open

    def hashes(self, namespace: bytes) -> Set[bytes]:
        """Return a live view of the hashes of a namespace's pages. Does not block."""
        return self._catalog.index.of_namespace(namespace).keys()

    def with_pages(self) -> list[bytes]:
        """Return the digests of the namespaces that have pages. Does not block."""
        return self._catalog.index.namespaces()

    @override
    def disks(self) -> list[DiskStatus]:
        return [DiskStatus(self._path, self.problem(), self.usage())]

    @override
    def check_integrity(self) -> list[str]:
        """Check index, slots, pending marks and counts against each other."""
        return disagreements(self._catalog)

    @override
    def close(self, deadline: float = math.inf) -> None:
        """Wait for calls in flight, then compact the journal to preserve the eviction order.

        Keeps the journal unchanged if compaction cannot finish by the deadline.
        """
        if not self._calls.close():
            return
        self._housekeeper.close()
        self._executor.close()
        if self._keep_journal:
            try:
                self._catalog.compact(lambda: time.monotonic() >= deadline)
            except CompactionGivenUpError:
                _log.info("not enough time to save the eviction order")
            except OSError as error:  # only the eviction order is lost
                self._gate.close(error)
            self._catalog.journal.close()
        else:
            self._catalog.journal.discard()
        self._segments.close()
        self._directory.close()

    def exempt(self, keys: Collection[PageKey]) -> None:
        """See `EvictionExemptions.exempt`."""
        self._catalog.exempt = keys

    # Pending uploads

    def mark_pending(self, keys: Sequence[PageKey]) -> int:
        """See `PendingUploads.mark_pending`. Writes the marks to the journal."""
        return self._mark(keys, pending=True)

    def mark_uploaded(self, keys: Sequence[PageKey]) -> None:
        """See `PendingUploads.mark_uploaded`. Clears the marks in the journal."""
        self._mark(keys, pending=False)
        self._housekeeper.wake()  # the pages can be evicted now, so there may be work

    def _mark(self, keys: Sequence[PageKey], *, pending: bool) -> int:
        with self._calls.enter() as entered:
            if entered:
                try:
                    return self._catalog.mark(keys, pending=pending)
                except OSError as error:
                    self._gate.close(error)
        return 0

    def pending(self) -> Iterator[PendingPage]:
        """See `PendingUploads.pending`."""
        return iter(self._catalog.pending_pages())

    def on_return(self, resume: Callable[[Sequence[PendingPage]], None]) -> None:
        """Do nothing: an open directory stays open."""

    # For `memkv verify`

    def verify(self, repair: bool, progress: Callable[[int, int], None]) -> VerifyReport:
        """Read and verify every page. Other calls can run at the same time.

        With `repair`, quarantines and removes corrupt and unreadable pages. Calls `progress` with
        the number of pages done and the total. Raises `TierError`.
        """
        with self._calls.enter() as entered:
            if not entered:
                raise TierError("the tier is closed")
            try:
                return self._verifier.verify(repair=repair, progress=progress)
            except OSError as error:
                raise TierError(f"cannot read the directory ({error})") from error

    def discard_journal(self) -> None:
        """Make `close` remove the journal, so that the next start rebuilds it from the footers."""
        self._keep_journal = False
