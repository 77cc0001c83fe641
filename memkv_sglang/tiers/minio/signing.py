"""Signed request heads, with credentials from the settings or from minio-py's providers."""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memkv_sglang import __version__
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.endpoints import Endpoint
from memkv_sglang.tiers.minio.sigv4 import UNSIGNED, authorization, request_date

if TYPE_CHECKING:
    from minio.credentials.credentials import Credentials
    from minio.credentials.providers import Provider

USER_AGENT = f"user-agent: sglang-memkv/{__version__}\r\n"


def credential_provider(config: MinioConfig) -> "Provider":
    """Return the settings' keys, else minio-py's standard chain. Imports minio-py (slow)."""
    from minio.credentials import providers

    if config.access_key or config.secret_key:
        return providers.StaticProvider(config.access_key, config.secret_key)
    return providers.ChainedProvider(
        [
            providers.EnvMinioProvider(),
            providers.EnvAWSProvider(),
            providers.AWSConfigProvider(),
            providers.MinioClientConfigProvider(),
            providers.IamAwsProvider(),
        ]
    )


class Signer:
    """Writes request heads. Safe for any number of threads."""

    def __init__(self, provider: "Provider", region: str) -> None:
        """Sign for a region with what the provider retrieves."""
        self._provider = provider
        self._region = region
        self._lock = threading.Lock()
        self._credentials = self._retrieve()

    def head(self, method: str, endpoint: Endpoint, path: str, fields: Mapping[str, str]) -> bytes:
        """Return the head of a request for a quoted path, with all fields (lower case) signed.

        Blocks only on the credential provider, when credentials ran out.
        """
        credentials, date = self._current(), request_date()
        signed = {
            "host": endpoint.netloc,
            "x-amz-content-sha256": UNSIGNED,
            "x-amz-date": date,
            **fields,
        }
        if credentials.session_token:
            signed["x-amz-security-token"] = credentials.session_token
        signature = authorization(
            method,
            path,
            signed,
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            region=self._region,
            date=date,
        )
        lines = "".join([f"{name}: {value}\r\n" for name, value in signed.items()])
        return (
            f"{method} {path} HTTP/1.1\r\n{lines}{USER_AGENT}authorization: {signature}\r\n\r\n"
        ).encode()

    def _current(self) -> "Credentials":
        if self._credentials.is_expired():
            with self._lock:
                if self._credentials.is_expired():
                    self._credentials = self._retrieve()
        return self._credentials

    def _retrieve(self) -> "Credentials":
        try:
            return self._provider.retrieve()
        except Exception as error:  # each provider has exceptions of its own
            raise TierError(
                "no credentials for MinIO: set MEMKV_MINIO_ACCESS_KEY and MEMKV_MINIO_SECRET_KEY, "
                "or one of minio-py's sources"
            ) from error
