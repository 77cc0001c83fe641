"""Pages of the bucket that this node treats as missing, although other nodes keep them."""

import json
import logging
import threading
from pathlib import Path

log = logging.getLogger(__name__)


class HiddenPages:
    """The server's time at which each namespace was cleared. Thread-safe.

    Pages stored before that time are hidden. A page that is stored again is newer, so it is found.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the times from `path`. If it is None, keep them only in memory."""
        self._path = path
        self._lock = threading.Lock()
        self._until: dict[str, float] = _read(path) if path is not None else {}

    def hide(self, namespace: bytes, until: float) -> None:
        """Hide the namespace's pages stored before `until`.

        Raises `OSError` if that cannot be saved.
        """
        with self._lock:
            self._until[namespace.hex()] = until
            if self._path is not None:
                temporary = self._path.with_suffix(".new")
                temporary.write_text(json.dumps(self._until))
                temporary.replace(self._path)

    def until(self, namespace: bytes) -> float:
        """Return the time before which stored pages are hidden; 0 if none are."""
        return self._until.get(namespace.hex(), 0.0)


def _read(path: Path) -> dict[str, float]:
    try:
        times = json.loads(path.read_text())
        return {str(name): float(until) for name, until in times.items()}
    except FileNotFoundError:
        return {}  # nothing was cleared
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning(
            "cleared pages may be found again",
            extra={"fields": {"file": str(path), "reason": str(error)}},
        )
        return {}
