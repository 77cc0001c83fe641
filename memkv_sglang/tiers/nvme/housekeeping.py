"""Background work: apply queued uses, free space, shrink files and compact the journal."""

import logging
import threading

from memkv_sglang.tiers.nvme.catalog import Catalog, CompactionGivenUpError
from memkv_sglang.tiers.nvme.faults import WriteGate
from memkv_sglang.tiers.nvme.space_reclaimer import SpaceReclaimer

_GROWTH = 4
"""A journal is compacted once it is this many times as long as a snapshot of all pages."""

_RETRY_SECONDS = 1.0
"""Seconds between attempts to shrink files that exceed the capacity but cannot shrink yet."""

_log = logging.getLogger(__name__)


class Housekeeper:
    """A background thread that sleeps until there is work."""

    def __init__(
        self,
        catalog: Catalog,
        reclaimer: SpaceReclaimer,
        gate: WriteGate,
        *,
        smallest_journal: int,
        check_interval: float,
    ) -> None:
        """Start the thread.

        It also checks for work every `check_interval` seconds, because other processes fill the
        file system too. A journal of up to `smallest_journal` bytes is not compacted.
        """
        self._smallest_journal = smallest_journal
        self._check_interval = check_interval
        self._catalog = catalog
        self._reclaimer = reclaimer
        self._gate = gate
        self._wake_event = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memkv-nvme-housekeeping")
        self._thread.daemon = True
        self._thread.start()

    def wake(self) -> None:
        """Wake the thread if there is work. Does not block."""
        if self._catalog.order.needs_flush or self._reclaimer.has_work() or self._is_journal_long():
            self._wake_event.set()

    def close(self) -> None:
        """Stop the thread after its current step."""
        self._closed = True
        self._reclaimer.stop()
        self._wake_event.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._wake_event.wait(
                _RETRY_SECONDS if self._reclaimer.is_over_capacity() else self._check_interval
            )
            self._wake_event.clear()
            if self._closed:
                return
            try:
                self._catalog.order.flush()
                if not self._gate.is_open:
                    continue
                self._reclaimer.shrink()
                self._reclaimer.reclaim_segments()
                self._reclaimer.trim()
                if self._is_journal_long() or not self._catalog.journal.is_in_place():
                    self._catalog.compact(lambda: self._closed)
            except CompactionGivenUpError:
                return
            except OSError as error:
                self._gate.close(error)
            except Exception:
                _log.exception("housekeeping failed")

    def _is_journal_long(self) -> bool:
        longest = max(_GROWTH * self._catalog.journal_size_if_new(), self._smallest_journal)
        return self._catalog.journal.size > longest
