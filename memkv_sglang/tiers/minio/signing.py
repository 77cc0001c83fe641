"""Signed request heads, with credentials from the settings or from minio-py's providers."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from memkv_sglang import __version__
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.background import BackgroundCall
from memkv_sglang.tiers.minio.bucket import bounded_http
from memkv_sglang.tiers.minio.endpoints import Endpoint
from memkv_sglang.tiers.minio.errors import OutOfTimeError, TransferError
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
            providers.IamAwsProvider(http_client=bounded_http()),
        ]
    )


class Signer:
    """Writes request heads. Safe for any number of threads."""

    def __init__(self, provider: "Provider", region: str) -> None:
        """Sign for a region with what the provider retrieves."""
        self._provider = provider
        self._region = region
        self._renewal = BackgroundCall(self._retrieve)
        self._credentials = self._retrieve()

    def credentials(self, deadline: float) -> "Credentials":
        """Return what to sign with; blocks on the provider where the last ones ran out.

        Raises `TransferError` if the provider has none, `OutOfTimeError` at the deadline.
        """
        if self._credentials.is_expired():
            renewal = self._renewal.begin()
            try:
                self._credentials = renewal.result(max(deadline - time.monotonic(), 0))
            except TimeoutError as error:
                raise OutOfTimeError("the deadline came before credentials did") from error
            except TierError as error:
                raise TransferError(str(error)) from error
        return self._credentials

    def head(
        self,
        credentials: "Credentials",
        method: str,
        endpoint: Endpoint,
        path: str,
        fields: Mapping[str, str],
    ) -> bytes:
        """Return the head of a request for a quoted path, with all fields (lower case) signed."""
        date = request_date()
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

    def _retrieve(self) -> "Credentials":
        try:
            return self._provider.retrieve()
        except Exception as error:  # each provider has exceptions of its own
            raise TierError(
                "no credentials for MinIO: set MEMKV_MINIO_ACCESS_KEY and MEMKV_MINIO_SECRET_KEY, "
                "or one of minio-py's sources"
            ) from error
