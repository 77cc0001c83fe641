"""What goes on behind the calls: uses settled, the watermark kept, the journal compacted."""

import logging
import threading

from memkv_sglang.tiers.nvme.catalog import Catalog, CompactionGivenUpError
from memkv_sglang.tiers.nvme.faults import WriteGate
from memkv_sglang.tiers.nvme.space_reclaimer import SpaceReclaimer

_GROWTH = 4
"""A journal is compacted when it is so many times as long as its snapshot would be."""

_RETRY_SECONDS = 1.0
"""How often files are tried again that are too large, but cannot be removed yet."""

_log = logging.getLogger(__name__)


class Housekeeper:
    """One thread, which sleeps until `wake` finds something to do."""

    def __init__(
        self,
        catalog: Catalog,
        room: SpaceReclaimer,
        gate: WriteGate,
        *,
        smallest_journal: int,
        look_every: float,
    ) -> None:
        """Start the thread; it also looks every so many seconds, as others change the disk too.

        The journal is rewritten once it is longer than `smallest_journal`.
        """
        self._smallest_journal = smallest_journal
        self._look_every = look_every
        self._catalog = catalog
        self._room = room
        self._gate = gate
        self._due = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memkv-nvme-housekeeping")
        self._thread.daemon = True
        self._thread.start()

    def wake(self) -> None:
        """Have the thread do what has become due; does not block."""
        if self._catalog.order.needs_flush or self._room.is_short() or self._is_journal_long():
            self._due.set()

    def close(self) -> None:
        """End the thread soon."""
        self._closed = True
        self._room.stop()
        self._due.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._due.wait(_RETRY_SECONDS if self._room.is_too_large() else self._look_every)
            self._due.clear()
            if self._closed:
                return
            try:
                self._catalog.order.flush()
                if not self._gate.is_open:
                    continue
                self._room.shrink()
                self._room.reclaim()
                self._room.trim()
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
