"""Descriptions of namespaces on their way to the shared tier, and kept there."""

import logging
import threading
import time

from memkv_sglang.namespace import Namespace
from memkv_sglang.tiers.base import Tier, TierError

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""Pause after an attempt that failed."""

KEPT_UP_SECONDS = 12 * 3600.0
"""How often all are written anew: a bucket's lifecycle rule counts days from the last time."""

KEPT_UP = 1024
"""Descriptions that are kept up at most, the newest ones."""


class NamespacePublisher:
    """Keeps descriptions in `tier` behind the caller's back. Thread-safe.

    Each is tried until the tier takes it, and written anew twice a day as long as this runs.
    """

    def __init__(self, tier: Tier) -> None:
        """Start the thread, which nobody waits for: a tier out of reach may hold it for long."""
        self._tier = tier
        self._kept_up: dict[bytes, bytes] = {}
        """Descriptions by digest, the newest last; parsed, they could take far more memory."""
        self._waiting: dict[bytes, None] = {}
        """Digests of those that are to be written, in this order."""
        self._removed: set[bytes] = set()
        """Digests of those that went with their pages when the namespace was cleared."""
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._complaint = ""
        threading.Thread(target=self._run, name="memkv-describe", daemon=True).start()

    def offer(self, namespace: Namespace) -> None:
        """Queue a description; returns at once."""
        with self._changed:
            self._kept_up.pop(namespace.digest, None)
            self._kept_up[namespace.digest] = namespace.description
            self._waiting[namespace.digest] = None
            if len(self._kept_up) > KEPT_UP:
                oldest = next(iter(self._kept_up))
                del self._kept_up[oldest]
                self._waiting.pop(oldest, None)
            self._changed.notify_all()

    def forget(self, namespace: bytes) -> None:
        """Note that the tier lost a namespace's description when it was cleared."""
        with self._changed:
            self._removed.add(namespace)
            self._removed &= self._kept_up.keys()

    def renew(self, namespace: bytes) -> None:
        """Queue the description again if it was removed: the namespace has pages once more."""
        if namespace not in self._removed:
            return
        with self._changed:
            self._removed.discard(namespace)
            if namespace in self._kept_up:
                self._waiting[namespace] = None
                self._changed.notify_all()

    def close(self) -> None:
        """Begin no further attempt; returns at once."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        due = time.monotonic() + KEPT_UP_SECONDS
        while not self._closed.is_set():
            description = self._next(due)
            if description is None:
                due = time.monotonic() + KEPT_UP_SECONDS
                self._queue_all()
            elif not self._describe(description):
                self._closed.wait(RETRY_SECONDS)

    def _next(self, due: float) -> bytes | None:
        """Return a description that waits; None if there was none until `due` or `close`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._closed.is_set(), due - time.monotonic()
            )
            return self._kept_up[next(iter(self._waiting))] if self._waiting else None

    def _queue_all(self) -> None:
        with self._changed:
            self._waiting = dict.fromkeys(self._kept_up)

    def _describe(self, description: bytes) -> bool:
        try:
            namespace = Namespace.parse(description)
            self._tier.describe(namespace)
        except TierError as error:
            if str(error) != self._complaint:  # logged once, until it changes or is over
                self._complaint = str(error)
                fields = {"tier": self._tier.name, "error": self._complaint}
                log.warning("namespace not described yet", extra={"fields": fields})
            return False
        except Exception:  # a defect; the thread must go on
            log.exception("namespace not described yet")
            return False
        self._complaint = ""
        with self._changed:
            self._waiting.pop(namespace.digest, None)
        return True
