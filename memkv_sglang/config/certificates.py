"""Load certificates and keys, and notice when their files change."""

import os
import ssl
import threading
import time
from collections.abc import Sequence

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import check_private, open_regular

CHECK_PERIOD = 1.0
"""Seconds between two checks of the files."""


class FileWatch:
    """Notices when files are rewritten or replaced, also behind symbolic links. Thread-safe."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Remember the files as they are now. Empty paths are ignored."""
        self._paths = [path for path in paths if path]
        self._lock = threading.Lock()
        self._seen = self._identities()
        self._checked = time.monotonic()

    def changed(self) -> bool:
        """Return whether a file has changed since the last call that returned True.

        Checks the files at most once per `CHECK_PERIOD`.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._checked < CHECK_PERIOD:
                return False
            self._checked = now
            seen, self._seen = self._seen, self._identities()
            return seen != self._seen

    def _identities(self) -> list[tuple[int, ...] | None]:
        return [_identity(path) for path in self._paths]


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - follows links
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load_certificate(context: ssl.SSLContext, section: str, cert_file: str, key_file: str) -> None:
    """Load a certificate and its private key. Other users must not have access to the key.

    `section` has the settings `cert_file` and `key_file`, perhaps after a prefix: `minio.`,
    `agent.http_`. Raises `ConfigError`.
    """
    cert_name, key_name, advice = f"{section}cert_file", f"{section}key_file", "name a PEM file"
    with (
        open_regular(cert_file, cert_name, advice) as certificate,
        open_regular(key_file, key_name, advice) as key,
    ):
        check_private(key, key_file, key_name)
        try:
            # OpenSSL accepts only paths; these lead to the files that were checked. An empty
            # password keeps OpenSSL from asking for one on the terminal.
            paths = f"/proc/self/fd/{certificate}", f"/proc/self/fd/{key}"
            context.load_cert_chain(*paths, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{cert_name}, {key_name}: {cert_file} and {key_file} are not a certificate and "
                f"its key ({_reason(error)}); name PEM files that belong together, the key without "
                "a password"
            ) from None


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return error.strerror or os.strerror(error.errno or 0)
