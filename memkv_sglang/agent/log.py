"""One line an event: `time=... level=... event="..." key=value ...` (logfmt)."""

import logging
import re
import sys
import threading
import time
from typing import Any

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.printable import LIMIT, quoted

BURST = 20
"""Lines of one event that pass at once."""

PERIOD = 30.0
"""Seconds after which one more passes."""

MAX_KIND = 200
"""Characters by which events are told apart."""

log = logging.getLogger(__name__)

EXCEPTION_LIMIT = 8000
"""Characters of a traceback that are logged."""

_PLAIN = re.compile(r"[\w.:/+@-]+")


class LogfmtFormatter(logging.Formatter):
    """Message as `event`, then the record's `fields` (from `extra`), then an exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, whatever the values hold."""
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
    """Lets `BURST` lines of one event pass, then one every `PERIOD`, so that no client fills a log.

    The first line that passes afterwards says how many of its kind were left out.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        super().__init__()
        self._limit = LogLimit(PERIOD, BURST)

    def filter(self, record: logging.LogRecord) -> bool:
        """Count a line, and tell whether it may pass."""
        if record.levelno <= logging.DEBUG:
            return True
        left_out = self._limit.admit((record.name, str(record.msg)[:MAX_KIND]))
        if left_out:
            record.fields = {**getattr(record, "fields", {}), "left_out": left_out}
        return left_out is not None


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    is_plain = len(text) <= LIMIT and _PLAIN.fullmatch(text)
    return text if is_plain else quoted(text)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to stderr and says nothing if that fails: there is no place left to say it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop the line."""


def configure_logging(level: str) -> None:
    """Send the project's events from `level` on, and everyone's warnings, to stderr.

    Exceptions that no code catches go the same way, so that they are limited too.
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
