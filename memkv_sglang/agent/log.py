"""Log one line per event, as logfmt or JSON.

Both have the same fields: `time=... level=... event="..." key=value ...`.
"""

import json
import logging
import math
import re
import sys
import threading
import time
from typing import Any

from memkv_sglang.agent import request_log
from memkv_sglang.log_limit import LogLimit
from memkv_sglang.printable import LIMIT, printable, quoted

BURST = 20
"""Number of lines of one event that are logged before its rate limit applies."""

PERIOD = 30.0
"""After that, seconds between two lines of the event."""

REQUEST_BURST = 2000
REQUEST_PERIOD = 0.05
"""The same limits for lines about requests, which then write at most about 30 MB per hour."""

MAX_KIND = 200
"""Two events are the same if their texts begin with the same characters, up to this many."""

PROJECT = "memkv_sglang"
"""Parent of all our loggers."""

log = logging.getLogger(__name__)

EXCEPTION_LIMIT = 8000
"""Maximum length of a logged traceback in characters."""

_PLAIN = re.compile(r"[\w.:/+@-]+")


class LogfmtFormatter(logging.Formatter):
    """Formats the message as `event`, then `fields` from `extra`, then the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, even if values contain line breaks."""
        parts = [f"{name}={_value(value)}" for name, value in _fields(record).items()]
        if record.exc_info:
            exception = self.formatException(record.exc_info)
            parts.append(f"exception={quoted(exception, EXCEPTION_LIMIT)}")
        return " ".join(parts)


class JsonFormatter(logging.Formatter):
    """Formats the same fields as one JSON object. Numbers and booleans stay what they are."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        fields = {name: _json_value(value) for name, value in _fields(record).items()}
        if record.exc_info:
            fields["exception"] = printable(self.formatException(record.exc_info), EXCEPTION_LIMIT)
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)


FORMATTERS: dict[str, type[logging.Formatter]] = {"text": LogfmtFormatter, "json": JsonFormatter}
"""By the value of `agent.log_format`."""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return {
        "time": f"{moment}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
        **getattr(record, "fields", {}),
    }


class FloodFilter(logging.Filter):
    """Limits each event to `BURST` lines, then one per `PERIOD`, so that clients cannot fill a log.

    Lines about requests (`request_log`) are limited to `REQUEST_BURST`, then one per
    `REQUEST_PERIOD`. The field `suppressed` of a line is the number of lines suppressed since the
    last one.
    """

    def __init__(self) -> None:
        """Start with no lines counted."""
        super().__init__()
        self._limit = LogLimit(PERIOD, BURST)
        self._requests = LogLimit(REQUEST_PERIOD, REQUEST_BURST)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the line."""
        if record.levelno <= logging.DEBUG:
            return True
        limit = self._requests if record.name == request_log.__name__ else self._limit
        suppressed = limit.admit((record.name, str(record.msg)[:MAX_KIND]))
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


def _json_value(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, int) else printable(value)


def _make_handler(log_format: str) -> logging.Handler:
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[log_format]())
    handler.addFilter(FloodFilter())
    return handler


def log_as_json() -> None:
    """Log this project's events in a server as JSON to stderr, instead of in SGLang's format.

    Idempotent.
    """
    project = logging.getLogger(PROJECT)
    if not any(isinstance(handler, _StderrHandler) for handler in project.handlers):
        project.addHandler(_make_handler("json"))
        project.propagate = False


def configure_logging(level: str, log_format: str = "text") -> None:
    """Log this project's events of at least `level`, and all libraries' warnings, to stderr.

    Exceptions that end a thread are logged as events too, and so are rate-limited.
    """
    handler = _make_handler(log_format)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger(PROJECT).setLevel(level.upper())
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
