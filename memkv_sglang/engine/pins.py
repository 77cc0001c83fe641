"""Keep pages that are pinned in the shared tier on this node's disk as well."""

import logging
import threading

from memkv_sglang.tiers.base import EvictionExemptions, PinReader, TierError

log = logging.getLogger(__name__)

REFRESH_INTERVAL = 30.0
"""Seconds between reads of the pins."""


class PinWatcher:
    """Copies the set of pins to the local tier, in a daemon thread."""

    def __init__(
        self, pins: PinReader, local: EvictionExemptions, *, interval: float = REFRESH_INTERVAL
    ) -> None:
        """Start at once, then refresh every `interval` seconds."""
        self._pins = pins
        self._local = local
        self._interval = interval
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="memkv-pins", daemon=True).start()

    def close(self) -> None:
        """Stop refreshing. Returns at once."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._local.exempt(self._pins.read_pins())
            except TierError as error:  # pages stay exempt until the pins can be read again
                log.debug("cannot read the pins", extra={"fields": {"reason": str(error)}})
            except Exception:  # This is a bug, but the thread must keep running.
                log.exception("cannot read the pins")
            self._closed.wait(self._interval)
