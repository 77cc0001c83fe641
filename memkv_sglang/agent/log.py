"""Log one line per event in logfmt: `time=... level=... event="..." key=value ...`."""

import logging
import re
import sys
import threading
import time
from typing import Any

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.printable import LIMIT, quoted

BURST = 20
"""Lines of one event that may pass in a burst."""

PERIOD = 30.0
"""Seconds until one more line of the event may pass."""

MAX_KIND = 200
"""Leading characters that distinguish events."""

log = logging.getLogger(__name__)

EXCEPTION_LIMIT = 8000
"""Maximum length of a logged traceback in characters."""

_PLAIN = re.compile(r"[\w.:/+@-]+")


class LogfmtFormatter(logging.Formatter):
    """Formats the message as `event`, then `fields` from `extra`, then the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, even if values contain line breaks."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        parts = [f"{name}={_value(value)}" for name, value in fields.items()]
        if record.exc_info:
            exception = self.formatException(record.exc_info)
            parts.append(f"exception={quoted(exception, EXCEPTION_LIMIT)}")
        return " ".join(parts)


class FloodFilter(logging.Filter):
    """Limits each event to `BURST` lines, then one per `PERIOD`, so that clients cannot fill a log.

    The next line that passes has the number of suppressed ones in its field `suppressed`.
    """

    def __init__(self) -> None:
        """Start with full bursts."""
        super().__init__()
        self._limit = LogLimit(PERIOD, BURST)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a line may pass."""
        if record.levelno <= logging.DEBUG:
            return True
        suppressed = self._limit.admit((record.name, str(record.msg)[:MAX_KIND]))
        if suppressed:
            record.fields = {**getattr(record, "fields", {}), "suppressed": suppressed}
        return suppressed is not None


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    is_plain = len(text) <= LIMIT and _PLAIN.fullmatch(text)
    return text if is_plain else quoted(text)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to stderr. Ignores failures, because there is nowhere else to report them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line."""


def configure_logging(level: str) -> None:
    """Log this project's events from `level` up, and warnings of all libraries, to stderr.

    Uncaught exceptions in threads are logged too, so that they are rate-limited like other lines.
    """
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    handler.addFilter(FloodFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger("memkv_sglang").setLevel(level.upper())
    threading.excepthook = _log_thread_failure
    sys.unraisablehook = _log_unraisable


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_type is SystemExit or failure.exc_value is None:
        return
    name = failure.thread.name if failure.thread else ""
    log.error("thread failed", exc_info=failure.exc_value, extra={"fields": {"thread": name}})


def _log_unraisable(failure: Any) -> None:
    fields = {"in": repr(failure.object)}
    log.error("exception ignored", exc_info=failure.exc_value, extra={"fields": fields})
