"""What https connections trust and present, for pages and the control path alike."""

import os
import ssl
from pathlib import Path

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import check_private
from memkv_sglang.config.schema import MinioConfig


def tls_context(config: MinioConfig) -> ssl.SSLContext | None:
    """Return the context for the settings' endpoints, None where all are plain http.

    The server's certificate must name its host, be in date, and descend from an authority of
    `minio.ca_file` or the system's. Raises `ConfigError`.
    """
    if all(url.startswith("http:") for url in endpoint_urls(config)):
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"minio.ca_file: cannot read authorities from {config.ca_file!r} "
            f"({_reason(error)}); it must be a PEM file"
        ) from None
    # Python leaves the least version to OpenSSL's configuration, which differs between systems.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.cert_file:
        _load_certificate(context, config)
    return context


def _load_certificate(context: ssl.SSLContext, config: MinioConfig) -> None:
    for setting, path in (("cert_file", config.cert_file), ("key_file", config.key_file)):
        try:
            status = Path(path).stat()
        except OSError as error:
            raise ConfigError(
                f"minio.{setting}: cannot read {path} ({error.strerror}); name a PEM file"
            ) from None
        if setting == "key_file":
            check_private(status, path, "minio.key_file")
    try:
        # An empty password, so that OpenSSL does not ask for one on the terminal.
        context.load_cert_chain(config.cert_file, config.key_file, password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"minio.cert_file, minio.key_file: {config.cert_file} and {config.key_file} are not "
            f"a certificate and its key ({_reason(error)}); name PEM files that belong together, "
            "the key without a password"
        ) from None


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").lower().replace("_", " ")
    return error.strerror or os.strerror(error.errno or 0)
