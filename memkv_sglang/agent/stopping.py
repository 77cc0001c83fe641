"""Handle signals that arrive while the agent starts, before the event loop handles them."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

UNWIND_LIMIT = 0.7
"""Seconds that an interrupted start has to clean up."""


class StoppedError(BaseException):
    """A signal stopped the agent before it was ready.

    Like `KeyboardInterrupt`, this is not an `Exception`, so that no code handles it as a fault.
    """


def interrupt_at_signal(exit_now: Callable[[], None]) -> None:
    """Make SIGTERM and SIGINT raise `StoppedError` in the main thread.

    The exception may get lost: a system call may hang on a broken disk, or a destructor may swallow
    it. So another thread calls `exit_now` after `UNWIND_LIMIT`, which must end the process. An
    event loop's own signal handlers replace this later.
    """
    stopping = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:  # a second signal must not interrupt the cleanup
            return
        stopping = True
        timer = threading.Timer(UNWIND_LIMIT, exit_now)
        timer.daemon = True
        timer.start()
        raise StoppedError

    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)
