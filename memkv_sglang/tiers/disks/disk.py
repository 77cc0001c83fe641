"""One of several disks: its directory, and the retries after the disk has failed."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from memkv_sglang.config.errors import BrokenDiskError, ConfigError
from memkv_sglang.config.schema import NvmeConfig
from memkv_sglang.page import PageKey
from memkv_sglang.tiers.base import DiskStatus, Fetched, LoadResult, TierError, TierUsage
from memkv_sglang.tiers.eviction import PolicyChooser
from memkv_sglang.tiers.nvme import NvmeTier
from memkv_sglang.tiers.nvme.directory import FORMAT_FILE

RETRY_SECONDS = 30.0
"""Seconds between attempts to open the directory of a broken disk."""

FAILED_PAGES = 8
"""Number of different pages that fail in a row before the disk counts as broken."""

_RETRY_ENDS = 5.0
"""Seconds that `close` waits for an attempt to open the directory."""

_log = logging.getLogger(__name__)


class Disk:
    """A directory that is either open, or closed and retried in the background. Thread-safe.

    Its pages count as missing while it is closed.
    """

    def __init__(
        self,
        config: NvmeConfig,
        chooser: PolicyChooser,
        prepare: Callable[[NvmeTier], None],
        returned: Callable[[NvmeTier], None],
    ) -> None:
        """Start closed.

        Args:
            config: the settings of this directory.
            chooser: chooses the reuse policy of all disks.
            prepare: called with an opened directory before its pages are found.
            returned: called after a successful retry.

        """
        self.directory = config.directory
        self.tier: NvmeTier | None = None
        """The open directory; None while the disk is broken."""
        self._config = config
        self._chooser = chooser
        self._prepare = prepare
        self._returned = returned
        self._problem = ""
        self._was_open = False
        self._uncleared: set[bytes] = set()
        """Namespaces to clear before the directory is used again."""
        self._failed: set[PageKey] = set()
        """Pages that have failed to load since the last page that was loaded."""
        self._evicted = 0
        """Number of pages evicted before the directory was last opened."""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> NvmeTier:
        """Open the directory. Raises `ConfigError`, and `TierError` if it cannot be used."""
        if self._was_open and not Path(self.directory, FORMAT_FILE).exists():
            # If the disk is not mounted, its empty mount point must not be filled in its place.
            raise BrokenDiskError(
                f"nvme.directory: {self.directory} has disappeared; mount its disk, or restart the "
                "agent to create it"
            )
        tier = NvmeTier(self._config, chooser=self._chooser)
        try:
            self._check_readable(tier)
            self._prepare(tier)
            while not self._publish(tier):
                for namespace in list(self._uncleared):
                    tier.clear(namespace)
                    self._uncleared.discard(namespace)
        except BaseException:
            tier.close()
            raise
        return tier

    def _check_readable(self, tier: NvmeTier) -> None:
        if not tier.is_readable:
            raise BrokenDiskError(
                f"nvme.directory: no segment of {self.directory} can be opened; check the kernel "
                "log for disk errors, or name another directory"
            )

    def _publish(self, tier: NvmeTier) -> bool:
        """Start to use the directory. Returns False if namespaces must be cleared first."""
        with self._lock:
            if self._closing.is_set():
                raise TierError("the tier is closed")
            if self._uncleared:
                return False
            self._was_open = True
            self._failed.clear()
            self.tier = tier
            return True

    def retry(self, problem: str) -> None:
        """Try to open the directory in the background until it works. `problem` is its fault."""
        self._problem = problem
        fields = {"directory": self.directory, "reason": problem, "retry_s": RETRY_SECONDS}
        _log.error("disk does not work, its pages count as missing", extra={"fields": fields})
        self._thread = threading.Thread(target=self._retry, name="memkv-disk-retry", daemon=True)
        self._thread.start()

    def _retry(self) -> None:
        while not self._closing.wait(RETRY_SECONDS):
            try:
                tier = self.open()
            except (ConfigError, TierError, OSError) as error:
                self._problem = str(error)
            except Exception:  # This is a bug, but the thread must keep running.
                _log.exception(
                    "cannot open a disk", extra={"fields": {"directory": self.directory}}
                )
            else:
                _log.warning("disk works again", extra={"fields": {"directory": self.directory}})
                self._returned(tier)
                return

    def record(self, keys: Sequence[PageKey], outcomes: Sequence[Fetched], tier: NvmeTier) -> None:
        """Record a load that had time left. Close the directory if its disk is broken."""
        results = [fetched.result for fetched in outcomes]
        if LoadResult.LOADED in results:
            self._failed.clear()
            return
        failed = (k for k, r in zip(keys, results, strict=True) if r is LoadResult.FAILED)
        with self._lock:
            self._failed.update(failed)
            if len(self._failed) < FAILED_PAGES or self.tier is not tier or self._closing.is_set():
                return
            self.tier = None
            self._evicted += tier.usage().evicted
            self._problem = f"{self.directory} cannot be read; check the kernel log"
        closer = threading.Thread(target=self._close_broken, args=(tier,), name="memkv-disk-close")
        closer.daemon = True  # in another thread, because the disk may never answer
        closer.start()

    def _close_broken(self, tier: NvmeTier) -> None:
        tier.close(time.monotonic())  # Waits for calls in flight, and writes nothing else.
        self.retry(self._problem)

    def clear(self, namespace: bytes) -> int:
        """See `Tier.clear`. A closed directory is cleared when it is opened. Raises `TierError`."""
        with self._lock:
            self._uncleared.add(namespace)  # the directory may be closed meanwhile
            tier = self.tier
        if tier is None:
            return 0
        removed = tier.clear(namespace)
        with self._lock:
            if self.tier is tier:
                self._uncleared.discard(namespace)
        return removed

    def status(self) -> DiskStatus:
        """Return the state of the disk, without I/O."""
        with self._lock:
            tier, evicted = self.tier, self._evicted
        if tier is None:
            problem = f"{self._problem}. The agent retries every {RETRY_SECONDS:g} s"
            return DiskStatus(
                self.directory, problem, TierUsage(0, 0, self._config.capacity, evicted)
            )
        usage = tier.usage()
        usage = usage._replace(evicted=usage.evicted + evicted)
        return DiskStatus(self.directory, tier.problem(), usage)

    def close(self, deadline: float) -> None:
        """Close the directory, see `Tier.close`, and stop retrying."""
        self._closing.set()
        with self._lock:
            tier = self.tier
        if tier is not None:
            tier.close(deadline)
        if self._thread is not None:
            self._thread.join(max(0, min(deadline - time.monotonic(), _RETRY_ENDS)))
