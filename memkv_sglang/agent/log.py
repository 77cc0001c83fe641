"""One line an event: `time=... level=... event="..." key=value ...` (logfmt)."""

import logging
import re
import sys
import time
from typing import Any

from memkv_sglang.printable import LIMIT, quoted

BURST = 50
PERIOD = 10.0
"""Seconds."""

EVENTS = 1000
"""Events told apart; those of the project are fewer, others may put what varies into theirs."""

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
    """Lets `BURST` lines of one event pass in `PERIOD` seconds, so that no client fills the disk.

    The first line after that tells how many of its kind were left out.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        super().__init__()
        self._seen: dict[tuple[str, object], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Count a line, and tell whether it may pass."""
        if record.levelno <= logging.DEBUG:
            return True
        if len(self._seen) > EVENTS:
            self._seen.clear()
        event = record.name, record.msg
        began, count = self._seen.get(event, (record.created, 0))
        if record.created - began >= PERIOD:
            if count > BURST:
                fields = getattr(record, "fields", {})
                record.fields = {**fields, "left_out": count - BURST}
            began, count = record.created, 0
        self._seen[event] = began, count + 1
        return count < BURST


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    is_plain = len(text) <= LIMIT and _PLAIN.fullmatch(text)
    return text if is_plain else quoted(text)


def configure_logging(level: str) -> None:
    """Send the project's events from `level` on, and everyone's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    handler.addFilter(FloodFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("memkv_sglang").setLevel(level.upper())
