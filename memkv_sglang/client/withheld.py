"""Buffers that a dead or hung agent may still write to although the load has returned.

A killed agent's disk requests end only when the disk completes them. A load cannot wait for that
forever, so it returns and its buffers are withheld: their owner must not use them until the agent's
writes have ended.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from memkv_sglang.agent.lifetime import has_ended

log = logging.getLogger(__name__)

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.1
_REMINDER = 10.0
"""Seconds between log lines while writes do not end."""


class Withheld:
    """Tracks agents whose writes have not ended. Thread-safe; only `wait` blocks."""

    def __init__(self) -> None:
        """Start with no agents."""
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._lifetimes: list[int] = []
        self._callbacks: list[Callable[[], None]] = []
        self._watched = False

    @property
    def pending(self) -> bool:
        """Whether any buffers are withheld."""
        return bool(self._lifetimes)

    def add(self, lifetime: int) -> None:
        """Withhold the buffers of an agent's loads until its `Lifetime` has ended.

        Takes ownership of the descriptor. Idempotent; never raises.
        """
        with self._changed:
            if lifetime not in self._lifetimes:
                self._lifetimes.append(lifetime)
            self._start_watching()

    def _start_watching(self) -> None:
        """Start the watching thread if needed. If that fails, the next call tries again."""
        if self.pending and not self._watched:
            thread = threading.Thread(target=self._watch, name="memkv-withheld", daemon=True)
            with suppress(RuntimeError):
                thread.start()
                self._watched = True

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call `callback` as soon as no buffers are withheld: now, or later in another thread."""
        with self._changed:
            if self.pending:
                self._callbacks.append(callback)
                self._start_watching()
                return
        callback()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until no buffers are withheld and every callback has returned.

        Returns False if that takes longer than `seconds`.
        """
        with self._changed:
            self._start_watching()
            return self._changed.wait_for(lambda: not self.pending, seconds)

    def _watch(self) -> None:
        begin = time.monotonic()
        pause, reminder = _SHORTEST_PAUSE, begin + _REMINDER
        while not self._release():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if time.monotonic() >= reminder:
                reminder += _REMINDER
                log.error(
                    "memkv: disk requests of a dead agent have not ended; buffers stay withheld",
                    extra={"fields": {"seconds": round(time.monotonic() - begin)}},
                )

    def _release(self) -> bool:
        """Forget the agents whose writes have ended. If none is left, run the callbacks."""
        with self._changed:
            ended = [lifetime for lifetime in self._lifetimes if has_ended(lifetime)]
            left = [lifetime for lifetime in self._lifetimes if lifetime not in ended]
            if not left:
                callbacks, self._callbacks = self._callbacks, []
                for callback in callbacks:
                    _call(callback)
                log.info("memkv: buffers are no longer withheld")
                self._watched = False
            self._lifetimes = left
            for lifetime in ended:
                os.close(lifetime)
            self._changed.notify_all()
            return not left

    def abandon_in_child(self) -> None:
        """Forget everything in a forked child; the buffers belong to the parent."""
        lifetimes = self._lifetimes
        self._reset()
        for lifetime in lifetimes:
            with suppress(OSError):
                os.close(lifetime)


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # A bug in one callback must not keep the others from running.
        log.exception("memkv: callback for released buffers failed")


withheld = Withheld()
"""The process's only instance, which all its clients share."""

os.register_at_fork(after_in_child=withheld.abandon_in_child)
