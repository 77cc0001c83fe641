"""Descriptions of namespaces on their way to the shared tier, tried until it takes them."""

import logging
import threading

from memkv_sglang.namespace import Namespace
from memkv_sglang.tiers.base import Tier, TierError

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""Pause after an attempt that failed."""


class Describer:
    """Keeps descriptions in `tier` behind the caller's back. Thread-safe."""

    def __init__(self, tier: Tier) -> None:
        """Start the thread, which nobody waits for: a tier out of reach may hold it for long."""
        self._tier = tier
        self._waiting: dict[bytes, Namespace] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="memkv-describe", daemon=True).start()

    def offer(self, namespace: Namespace) -> None:
        """Queue a description; returns at once."""
        with self._changed:
            self._waiting[namespace.digest] = namespace
            self._changed.notify_all()

    def close(self) -> None:
        """Begin no further attempt; returns at once."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while (namespace := self._next()) is not None:
            if self._describe(namespace):
                with self._changed:
                    self._waiting.pop(namespace.digest, None)
            else:
                self._closed.wait(RETRY_SECONDS)

    def _next(self) -> Namespace | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
            return None if self._closed.is_set() else next(iter(self._waiting.values()))

    def _describe(self, namespace: Namespace) -> bool:
        try:
            self._tier.describe(namespace)
        except TierError as error:
            fields = {"tier": self._tier.name, "error": str(error)}
            log.warning("namespace not described yet", extra={"fields": fields})
            return False
        except Exception:  # a defect; the thread must go on
            log.exception("namespace not described yet")
            return False
        return True
