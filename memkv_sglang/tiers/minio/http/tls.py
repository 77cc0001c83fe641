"""The TLS settings of all https connections to MinIO."""

import logging
import ssl
import threading
from collections.abc import Callable

from memkv_sglang.config.certificates import FileWatch, load_certificate
from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.environment import trusting_context
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig

log = logging.getLogger(__name__)

ContextSource = Callable[[], ssl.SSLContext]
"""Returns the context for a new connection. Thread-safe."""


def tls_context(config: MinioConfig) -> ContextSource | None:
    """Return the source of contexts for the configured endpoints, None if all are plain http.

    The server's certificate must name its host, be in date, and be signed by an authority in
    `minio.ca_file` or in the system's store. When `ca_file`, `cert_file` or `key_file` changes, new
    connections use the new content. Raises `ConfigError`.
    """
    if all(url.startswith("http:") for url in endpoint_urls(config)):
        return None
    return _ReloadedContext(config).current


class _ReloadedContext:
    """A context that follows its files. If new files are invalid, it stays as it is."""

    def __init__(self, config: MinioConfig) -> None:
        self._config = config
        self._watch = FileWatch([config.ca_file, config.cert_file, config.key_file])
        self._lock = threading.Lock()
        self._context = _make_context(config)

    def current(self) -> ssl.SSLContext:
        with self._lock:
            if self._watch.changed():
                self._reload()
            return self._context

    def _reload(self) -> None:
        try:
            # Create a new one, because a context cannot forget authorities.
            self._context = _make_context(self._config)
        # for example because the certificate was replaced, but its key was not yet
        except ConfigError as error:
            fields = {"reason": str(error)}
            log.warning("cannot use the changed certificates", extra={"fields": fields})
        else:
            log.info("certificates reloaded")


def _make_context(config: MinioConfig) -> ssl.SSLContext:
    context = trusting_context(config.ca_file, "minio.ca_file")
    # By default, the minimum version depends on the system's OpenSSL configuration.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.cert_file:
        load_certificate(context, "minio.", config.cert_file, config.key_file)
    return context
