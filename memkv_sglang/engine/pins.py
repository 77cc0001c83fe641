"""Pinned pages: what is pinned in the shared tier is kept on this node's disk, too."""

import logging
import threading

from memkv_sglang.tiers.base import EvictionExemptions, PinReader, TierError

log = logging.getLogger(__name__)

LOOK_SECONDS = 30.0
"""How often the pins are read again."""


class PinWatcher:
    """Tells `keeper` what `pins` has, in a thread that nobody waits for."""

    def __init__(
        self, pins: PinReader, keeper: EvictionExemptions, *, every: float = LOOK_SECONDS
    ) -> None:
        """Begin at once; look again after so many seconds."""
        self._pins = pins
        self._keeper = keeper
        self._every = every
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="memkv-pins", daemon=True).start()

    def close(self) -> None:
        """Look no more; returns at once."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._keeper.exempt(self._pins.read_pins())
            except TierError as error:  # what is kept stays so until it is known better
                log.debug("pins not read", extra={"fields": {"reason": str(error)}})
            except Exception:  # a defect; the thread must go on
                log.exception("pins not read")
            self._closed.wait(self._every)
