"""Signals that arrive while the agent starts, before its event loop can take them."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

UNWIND_LIMIT = 0.7
"""Seconds that an interrupted start gets to clean up."""


class StoppedError(BaseException):
    """A signal asked the agent to end before it was ready.

    Not an `Exception`: like `KeyboardInterrupt`, no part of the start may take it for a fault.
    """


def interrupt_at_signal(leave: Callable[[], None]) -> None:
    """Let SIGTERM and SIGINT raise `StoppedError` in the main thread, wherever that is.

    It may not get through: a system call may hang on a broken disk, a destructor may swallow it.
    Then `leave`, called by another thread, must end the process. Event loops that take the signals
    over later replace all this.
    """
    stopping = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:  # do not interrupt the cleaning up
            return
        stopping = True
        timer = threading.Timer(UNWIND_LIMIT, leave)
        timer.daemon = True
        timer.start()
        raise StoppedError

    for number in STOP_SIGNALS:
        signal.signal(number, on_signal)
