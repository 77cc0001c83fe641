"""Make a node forget all pages in a server's namespaces, in the background."""

import logging
import threading
from collections.abc import Iterable

from memkv_sglang.client.client import AgentClient
from memkv_sglang.plugin import state

log = logging.getLogger(__name__)

CLEAR_SECONDS = 600.0
"""Seconds to clear one namespace."""

UPLOAD_SECONDS = 10.0
"""Seconds to wait for uploads that began before the clear."""

RETRY_SECONDS = 5.0


class Clearing:
    """The namespaces that are being cleared. Thread-safe.

    For these namespaces, the storage misses lookups and drops spills. Otherwise a spill could be
    deleted by the clear, or survive it.
    """

    def __init__(self, client: AgentClient, spill_lock: threading.Lock) -> None:
        """Resume interrupted clears. A spill must hold `spill_lock` while it checks and stores."""
        self._client = client
        self._spill_lock = spill_lock
        self._lock = threading.Lock()
        self._digests: set[bytes] = set()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self.begin(state.unfinished_clears)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def begin(self, digests: Iterable[bytes]) -> None:
        """Start to clear these namespaces. Returns at once. Idempotent."""
        with self._lock:
            self._digests = self._digests | set(digests)
            if self._digests and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memkv-clear", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop clearing. Agents finish the deletions that they have begun. Returns at once."""
        self._closed.set()
        with self._lock:
            state.unfinished_clears.update(self._digests)

    def _run(self) -> None:
        log.info("memkv: clearing %d namespaces", len(self._digests))
        warned = False
        while not self._closed.is_set():
            digests = self._digests
            self._client.wait(RETRY_SECONDS)
            if self._clear(digests):
                if self._is_done(digests):
                    log.info("memkv: storage cleared")
                    return
            elif not self._closed.is_set():
                if not warned:
                    log.warning("memkv: storage not cleared yet, so lookups miss; still retrying")
                warned = True
                self._closed.wait(RETRY_SECONDS)

    def _is_done(self, removed: set[bytes]) -> bool:
        with self._lock:
            if self._digests != removed:
                return False  # `begin` was called meanwhile
            self._digests, self._thread = set(), None
            state.unfinished_clears.difference_update(removed)
            return True

    def _clear(self, digests: Iterable[bytes]) -> bool:
        with self._spill_lock:
            pass  # wait for spills that began before the clear
        if not self._clear_all(digests):
            return False
        # Uploads that were in flight may have added pages after the shared tier was cleared.
        self._client.flush(UPLOAD_SECONDS)
        return self._clear_all(digests)

    def _clear_all(self, digests: Iterable[bytes]) -> bool:
        return all(
            not self._closed.is_set() and self._client.hide(digest, CLEAR_SECONDS)
            for digest in digests
        )
