"""One line an event: `time=... level=... event="..." key=value ...` (logfmt)."""

import json
import logging
import re
import sys
import time
from typing import Any

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
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def configure_logging(level: str) -> None:
    """Send the project's events from `level` on, and everyone's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("memkv_sglang").setLevel(level.upper())
