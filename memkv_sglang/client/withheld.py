"""Memory that a dead or hung agent may still write to although its load has returned.

A killed agent's requests end only when the disk lets them. A load does not wait for that longer
than SGLang can bear, so its buffers are withheld: whoever owns them must not use them before the
agent's writes have ended.
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
    """The agents whose writes have not ended. Thread-safe, never blocks but in `wait`."""

    def __init__(self) -> None:
        """Start without any."""
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._lifetimes: list[int] = []
        self._callbacks: list[Callable[[], None]] = []
        self._watched = False

    @property
    def pending(self) -> bool:
        """Whether any buffers are withheld now."""
        return bool(self._lifetimes)

    def add(self, lifetime: int) -> None:
        """Withhold the buffers of an agent's loads until its `Lifetime` has ended.

        Owns the descriptor from now on. Idempotent, never fails.
        """
        with self._changed:
            if lifetime not in self._lifetimes:
                self._lifetimes.append(lifetime)
            self._start_watching()

    def _start_watching(self) -> None:
        """Start the thread unless it runs; where there is none to be had, the next call tries."""
        if self.pending and not self._watched:
            thread = threading.Thread(target=self._watch, name="memkv-withheld", daemon=True)
            with suppress(RuntimeError):
                thread.start()
                self._watched = True

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call back once no buffers are withheld: at once, or later in another thread."""
        with self._changed:
            if self.pending:
                self._callbacks.append(callback)
                self._start_watching()
                return
        callback()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until no buffers are withheld and every callback has returned.

        Returns False after so many seconds.
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
                    "the disk still holds requests of an ended agent; pages stay withheld",
                    extra={"fields": {"seconds": round(time.monotonic() - begin)}},
                )

    def _release(self) -> bool:
        """Forget the agents whose writes have ended; once it is all of them, call back."""
        with self._changed:
            ended = [lifetime for lifetime in self._lifetimes if has_ended(lifetime)]
            left = [lifetime for lifetime in self._lifetimes if lifetime not in ended]
            if not left:
                callbacks, self._callbacks = self._callbacks, []
                for callback in callbacks:
                    _call(callback)
                log.info("pages are no longer withheld")
                self._watched = False
            self._lifetimes = left
            for lifetime in ended:
                os.close(lifetime)
            self._changed.notify_all()
            return not left

    def leave_to_parent(self) -> None:
        """Forget everything in a forked child: the memory is its parent's to care for."""
        lifetimes = self._lifetimes
        self._reset()
        for lifetime in lifetimes:
            with suppress(OSError):
                os.close(lifetime)


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:  # a defect; the others must be called all the same
        log.exception("pages that were withheld could not be released")


withheld = Withheld()
"""Of this process, whichever clients it has or had."""

os.register_at_fork(after_in_child=withheld.leave_to_parent)
