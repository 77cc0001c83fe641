"""The TLS settings of all https connections to MinIO."""

import os
import ssl

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.environment import trusting_context
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import check_private, open_regular
from memkv_sglang.config.schema import MinioConfig


def tls_context(config: MinioConfig) -> ssl.SSLContext | None:
    """Return the context for the configured endpoints, None if all are plain http.

    The server's certificate must name its host, be in date, and be signed by an authority in
    `minio.ca_file` or in the system's store. Raises `ConfigError`.
    """
    if all(url.startswith("http:") for url in endpoint_urls(config)):
        return None
    context = trusting_context(config.ca_file, "minio.ca_file")
    # By default, the minimum version depends on the system's OpenSSL configuration.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if config.cert_file:
        _load_certificate(context, config)
    return context


def _load_certificate(context: ssl.SSLContext, config: MinioConfig) -> None:
    advice = "name a PEM file"
    with (
        open_regular(config.cert_file, "minio.cert_file", advice) as certificate,
        open_regular(config.key_file, "minio.key_file", advice) as key,
    ):
        check_private(key, config.key_file, "minio.key_file")
        _load_chain(context, certificate, key, config)


def _load_chain(context: ssl.SSLContext, certificate: int, key: int, config: MinioConfig) -> None:
    try:
        # OpenSSL accepts only paths; these refer to the files that were checked. An empty password
        # keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(f"/proc/self/fd/{certificate}", f"/proc/self/fd/{key}", password="")
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
