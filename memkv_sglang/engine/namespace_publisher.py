"""Publish namespace descriptions in the shared tier, and keep them from expiring."""

import logging
import threading
import time

from memkv_sglang.namespace import Namespace
from memkv_sglang.tiers.base import Tier, TierError

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""Seconds between attempts that fail."""

RENEW_INTERVAL = 12 * 3600.0
"""Seconds after which a description is written again. A lifecycle rule of the bucket counts days
from the last write."""

MAX_PUBLISHED = 1024
"""Number of the newest descriptions to keep published."""


class NamespacePublisher:
    """Writes descriptions to a tier in the background. Thread-safe.

    Retries until the tier accepts a description, and rewrites it every `RENEW_INTERVAL`.
    """

    def __init__(self, tier: Tier) -> None:
        """Start a daemon thread. It is never joined, because an unreachable tier may block it."""
        self._tier = tier
        self._published: dict[bytes, bytes] = {}
        """Descriptions by digest, newest last. They are not parsed, which saves much memory."""
        self._pending: dict[bytes, None] = {}
        """Digests of descriptions to write, in order."""
        self._removed: set[bytes] = set()
        """Digests of descriptions that were deleted when their namespace was cleared."""
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._last_error = ""
        threading.Thread(target=self._run, name="memkv-describe", daemon=True).start()

    def offer(self, namespace: Namespace) -> None:
        """Queue a description. Returns at once."""
        with self._changed:
            self._published.pop(namespace.digest, None)
            self._published[namespace.digest] = namespace.description
            self._pending[namespace.digest] = None
            if len(self._published) > MAX_PUBLISHED:
                oldest = next(iter(self._published))
                del self._published[oldest]
                self._pending.pop(oldest, None)
            self._changed.notify_all()

    def forget(self, namespace: bytes) -> None:
        """Record that clearing a namespace deleted its description."""
        with self._changed:
            self._removed.add(namespace)
            self._removed &= self._published.keys()

    def renew(self, namespace: bytes) -> None:
        """Queue the description again if it was deleted, because the namespace gets new pages."""
        if namespace not in self._removed:
            return
        with self._changed:
            self._removed.discard(namespace)
            if namespace in self._published:
                self._pending[namespace] = None
                self._changed.notify_all()

    def close(self) -> None:
        """Start no further attempt. Returns at once."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        due = time.monotonic() + RENEW_INTERVAL
        while not self._closed.is_set():
            description = self._next(due)
            if description is None:
                due = time.monotonic() + RENEW_INTERVAL
                self._queue_all()
            elif not self._describe(description):
                self._closed.wait(RETRY_SECONDS)

    def _next(self, due: float) -> bytes | None:
        """Return the next description to write; None at `due` or after `close`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._pending or self._closed.is_set(), due - time.monotonic()
            )
            return self._published[next(iter(self._pending))] if self._pending else None

    def _queue_all(self) -> None:
        with self._changed:
            self._pending = dict.fromkeys(self._published)

    def _describe(self, description: bytes) -> bool:
        try:
            namespace = Namespace.parse(description)
            self._tier.describe(namespace)
        except TierError as error:
            if str(error) != self._last_error:  # log the same error only once
                self._last_error = str(error)
                fields = {"tier": self._tier.name, "error": self._last_error}
                log.warning(
                    "cannot store a namespace description, still retrying",
                    extra={"fields": fields},
                )
            self._postpone(namespace.digest)
            return False
        except Exception:  # This is a bug, but the thread must keep running.
            log.exception("cannot store a namespace description, still retrying")
            return False
        self._last_error = ""
        with self._changed:
            self._pending.pop(namespace.digest, None)
        return True

    def _postpone(self, digest: bytes) -> None:
        """Move a description to the end, because only the shard that it needs may be down."""
        with self._changed:
            if digest in self._pending:
                self._pending[digest] = self._pending.pop(digest)
