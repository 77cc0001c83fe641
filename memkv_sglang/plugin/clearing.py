"""Removing what a server's namespaces hold, behind the caller's back."""

import logging
import threading
from collections.abc import Iterable

from memkv_sglang.client.client import AgentClient
from memkv_sglang.plugin import state

log = logging.getLogger(__name__)

REMOVAL_SECONDS = 600.0
"""How long a namespace's removal may take; a million objects in MinIO take some minutes."""

UPLOAD_SECONDS = 10.0
"""How long to wait for uploads that had begun before."""

RETRY_SECONDS = 5.0


class Clearing:
    """Namespaces whose removal has been asked for and is not confirmed yet. Thread-safe.

    Who uses a namespace treats it as closed while it is in here: nothing of it is found, and
    nothing is added that the removal could take away again or leave behind.
    """

    def __init__(self, client: AgentClient, spilling: threading.Lock) -> None:
        """`spilling` is held by every spill, which asks for itself whether it may go on."""
        self._client = client
        self._spilling = spilling
        self._lock = threading.Lock()
        self._digests: set[bytes] = set()
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self.begin(state.unfinished_clears)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._digests

    def begin(self, digests: Iterable[bytes]) -> None:
        """Close the namespaces and remove what they hold; returns at once, idempotent."""
        with self._lock:
            self._digests = self._digests | set(digests)
            if self._digests and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="memkv-clear", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Try no more; what an agent has begun it finishes. Returns at once."""
        self._closed.set()
        with self._lock:
            state.unfinished_clears.update(self._digests)

    def _run(self) -> None:
        log.info("memkv: clearing %d namespaces", len(self._digests))
        warned = False
        while not self._closed.is_set():
            digests = self._digests
            self._client.wait(RETRY_SECONDS)
            if self._remove(digests):
                if self._is_done(digests):
                    log.info("memkv: storage cleared")
                    return
            elif not self._closed.is_set():
                if not warned:
                    log.warning("memkv: storage not cleared yet, closed until it is; trying on")
                warned = True
                self._closed.wait(RETRY_SECONDS)

    def _is_done(self, removed: set[bytes]) -> bool:
        with self._lock:
            if self._digests != removed:
                return False  # asked for once more
            self._digests, self._thread = set(), None
            state.unfinished_clears.difference_update(removed)
            return True

    def _remove(self, digests: Iterable[bytes]) -> bool:
        with self._spilling:
            pass  # a spill that found its namespace open has ended
        if not self._empty(digests):
            return False
        # What was on its way to the shared tier has arrived after that was emptied.
        self._client.flush(UPLOAD_SECONDS)
        return self._empty(digests)

    def _empty(self, digests: Iterable[bytes]) -> bool:
        return all(
            not self._closed.is_set() and self._client.empty(digest, REMOVAL_SECONDS)
            for digest in digests
        )
