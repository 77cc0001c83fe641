"""Remember which pages this node has stored, used and removed, until a log says so.

A use is logged once per period, and a batch takes one request, so using a page costs far less than
a request. Pages that this node stored are logged within a minute, because other nodes cannot
collect or clear them before that.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import ServerClock
from memkv_sglang.tiers.minio.objects import Telemetry
from memkv_sglang.tiers.minio.retention.logs import LogStore

log = logging.getLogger(__name__)

BATCH = 1 << 16
"""Number of entries in a full log, which has 4 MiB."""

STORE_SECONDS = 60.0
"""Maximum seconds from storing a page to logging it."""

QUEUE_LIMIT = 1_000_000
"""Maximum number of pages in events that wait for the thread, and of entries that wait for a log.

If there are more, they are dropped and counted.
"""

REMEMBERED = 1_000_000
"""Maximum number of pages whose use in this period is remembered, which takes about 130 MB."""

WAKE_SECONDS = 1.0
"""Seconds between two looks of the thread at new events."""

RETRY_SECONDS = 5.0
"""Seconds to wait after a log could not be written."""

REMOVED = 0xFFFFFFFF
UNKNOWN = 0xFFFFFFFF
"""The same as in `entries`, which is imported late because numpy is slow to import."""


class LogTarget(NamedTuple):
    """Where to write logs to."""

    logs: LogStore
    now: Callable[[], float]
    """Asks the server for its time. Blocks. Raises `TierError`."""


class _Event(NamedTuple):
    """Something that happened to pages."""

    when: float
    """On `time.monotonic`."""
    names: Sequence[bytes]
    """Namespace digest and hash of each page."""
    size: int = 0
    """Bytes of each page; 0 if unknown, or `REMOVED`."""
    written: bool = False
    positions: Sequence[int] | None = None
    """Positions of the pages in the chain; None if unknown."""


class _Row:
    """What a log will say about a page."""

    __slots__ = ("position", "size", "used", "written")

    def __init__(self) -> None:
        self.size = self.used = self.written = 0
        self.position = UNKNOWN


class UseLog:
    """Collects events and writes them to logs in the background. Thread-safe."""

    def __init__(
        self, target: Callable[[], LogTarget], clock: ServerClock, telemetry: Telemetry
    ) -> None:
        """Prepare the log. The thread starts later. `target` may block, and raise `TierError`."""
        self._target = target
        self._clock = clock
        self._telemetry = telemetry
        self._period = 3600.0
        self._delay = 600.0
        self._events: deque[_Event] = deque()
        self._queued = 0
        self._rows: dict[bytes, _Row] = {}
        self._removals: dict[bytes, _Row] = {}
        self._remembered: dict[bytes, bool] = {}
        """Pages whose use in this period is recorded, with whether their position is recorded."""
        self._number = -1
        self._latest = self._latest_removal = 0
        """Times of the latest event and of the latest removal. Entries have whole seconds; see
        `_in_order`."""
        self._first_row = self._first_store = 0.0
        """When the oldest row was added, on `time.monotonic`; 0 if there is none."""
        self._wanted = self._written = 0
        """Numbers of the last flush that was requested, and of the last one that was done."""
        self._failed_at = float("-inf")
        self._failures = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def configure(self, period: float, delay: float) -> None:
        """Log uses once per `period`, and write a log at least every `delay` seconds."""
        self._period, self._delay = period, delay

    def used(self, chain: Chain, positions: Sequence[int] | None = None) -> None:
        """Record the use of a chain's pages, and their positions in the chain if they are known.

        Does not block.
        """
        names = [chain.namespace + page for page in chain.hashes]
        self._add(_Event(time.monotonic(), names, positions=positions))

    def stored(self, keys: Iterable[PageKey], size: int) -> None:
        """Record that pages may have been stored as objects of `size` bytes. Does not block."""
        names = [namespace + page_hash for namespace, page_hash in keys]
        self._add(_Event(time.monotonic(), names, size, written=True))

    def loaded(self, keys: Iterable[PageKey], size: int) -> None:
        """Record that pages of `size` stored bytes were loaded. Does not block."""
        self._add(_Event(time.monotonic(), [key.namespace + key.hash for key in keys], size))

    def removed(self, keys: Iterable[PageKey]) -> None:
        """Record that pages were removed on purpose. Does not block."""
        names = [key.namespace + key.hash for key in keys]
        self._add(_Event(time.monotonic(), names, REMOVED))

    def _add(self, event: _Event) -> None:
        if not event.names:
            return
        with self._changed:
            if self._queued + len(event.names) > QUEUE_LIMIT or self._closing:
                self._telemetry.count("uses_not_recorded", len(event.names))
                return
            self._queued += len(event.names)
            self._events.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memkv-use-log", daemon=True)
                self._thread.start()

    def request_flush(self) -> None:
        """Make the thread write what it has. Does not block."""
        with self._changed:
            self._wanted += 1
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Write everything recorded so far; return False if that fails or exceeds `timeout`.

        After a failure, the thread tries again by itself.
        """
        with self._changed:
            if self._thread is None:
                return True
            self._wanted += 1
            number = self._wanted
            self._failed_at = float("-inf")
            self._changed.notify_all()
            failures = self._failures
            self._changed.wait_for(
                lambda: self._written >= number or self._failures > failures, timeout
            )
            return self._written >= number

    def close(self, seconds: float) -> None:
        """Write the remaining entries within `seconds`, then stop. Idempotent."""
        if self._thread is None:
            self._closing = True
            return
        self.flush(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._closing:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._wanted > self._written, WAKE_SECONDS
                )
                wanted = self._wanted
                flush = wanted > self._written
            try:
                self._step(flush=flush)
            except TierError as error:
                self._telemetry.fault("log not written", error)
                self._pause_after_failure(RETRY_SECONDS if not flush else 1)
            except Exception:  # A bug must not end the thread, and must not count as written.
                log.exception("log not written")
                self._pause_after_failure(RETRY_SECONDS)
            else:
                with self._changed:
                    self._written = wanted
                    self._changed.notify_all()

    def _pause_after_failure(self, seconds: float) -> None:
        with self._changed:
            self._failed_at = time.monotonic()
            self._failures += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closing, seconds)

    def _step(self, *, flush: bool) -> None:
        """Turn events into rows, and write a log if one is due."""
        now = time.monotonic()
        if not flush and now - self._failed_at < RETRY_SECONDS:
            return
        if not self._events and not self._rows and not self._removals:
            return
        server = self._clock.reading()
        if server is None:
            server = self._target().now()
        is_last = False
        while not is_last:
            is_last = self._take_events(server - now) or not flush
            if flush or self._is_due(now, server):
                self._write(server)

    def _is_due(self, now: float, server: float) -> bool:
        """Return whether a log is due. `server` is the server's time at `now`."""
        if self._removals or len(self._rows) >= BATCH:
            return True
        if self._first_row and (
            now - self._first_row >= self._delay
            or (self._first_row + server - now) // self._period < server // self._period
        ):
            return True
        stores = min(STORE_SECONDS, self._delay)
        return bool(self._first_store) and now - self._first_store >= stores

    def _take_events(self, ahead: float) -> bool:
        """Turn events into rows. Returns False if some are left because there are too many rows."""
        while True:
            with self._changed:
                if not self._events:
                    return True
                if len(self._rows) >= QUEUE_LIMIT:
                    return False
                event = self._events.popleft()
                self._queued -= len(event.names)
            self._take(event, int(event.when + ahead))

    def _in_order(self, event: _Event, when: int) -> int:
        """Return a time that orders stores and removals within one second as they happened.

        A removal cancels everything up to its time.
        """
        if event.size == REMOVED:
            when = self._latest_removal = max(when, self._latest)
        elif event.written:
            when = max(when, self._latest_removal + 1)
        self._latest = max(self._latest, when)
        return when

    def _take(self, event: _Event, when: int) -> None:
        when = self._in_order(event, when)
        if (number := when // self._period) != self._number:
            self._number = int(number)
            self._remembered.clear()
        if event.size == REMOVED:
            for name in event.names:
                self._rows.pop(name, None)
                self._remembered.pop(name, None)
                self._removals[name] = row = _Row()
                row.size, row.used = REMOVED, when
            self._first_row = self._first_row or event.when
            return
        known = event.positions is not None
        for index, name in enumerate(event.names):
            if (
                not event.written
                and self._remembered.get(name, False) >= known
                and (name in self._remembered)
            ):
                continue
            self._remember(name, known)
            row = self._rows.get(name) or _Row()
            self._rows[name] = row
            row.used = max(row.used, when)
            row.size = max(row.size, event.size)
            if event.written:
                row.written = when
                self._first_store = self._first_store or event.when
            if event.positions is not None:
                row.position = event.positions[index]
            self._first_row = self._first_row or event.when

    def _remember(self, name: bytes, known: bool) -> None:
        if len(self._remembered) >= REMEMBERED:
            self._remembered.clear()
        self._remembered[name] = known or self._remembered.get(name, False)

    def _write(self, server: float) -> None:
        """Write all rows, in as many logs as necessary. If that fails, the rows stay."""
        from memkv_sglang.tiers.minio.retention.entries import COUNT_LIMIT, entries, split

        rows = [*self._removals.items(), *self._rows.items()]
        if not rows:
            return
        logs = self._target().logs
        found = entries((name, r.size, r.used, r.written, r.position) for name, r in rows)
        for part in split(found, COUNT_LIMIT):
            logs.write(part, server)
        self._rows.clear()
        self._removals.clear()
        self._first_row = self._first_store = 0.0
