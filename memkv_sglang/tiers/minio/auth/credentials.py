"""Sources of the keys that sign requests. New keys take effect without a restart.

This module imports minio-py, which is slow, so import it late.
"""

import configparser
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from minio.credentials import providers
from minio.credentials.credentials import Credentials
from typing_extensions import override
from urllib3.exceptions import HTTPError

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio.auth.credentials_file import FileCredentials, read_credentials
from memkv_sglang.tiers.minio.http import tls_context
from memkv_sglang.tiers.minio.http.control import ControlHttp

log = logging.getLogger(__name__)

FILE_LIFETIME = timedelta(seconds=15)
"""Seconds for which the content of a file is used before the file is read again. minio-py subtracts
10."""


class RenewableProvider(providers.Provider):
    """A provider that can fetch new credentials after a refusal."""

    advice = (
        "no credentials for MinIO: set MEMKV_MINIO_ACCESS_KEY and MEMKV_MINIO_SECRET_KEY, or one "
        "of minio-py's sources"
    )
    """Text of the error if there are no credentials."""

    def renew(self) -> None:
        """Make the next `retrieve` fetch credentials from the source."""


class StaticKeys(RenewableProvider):
    """The keys in the settings, which do not change while the process runs."""

    def __init__(self, access_key: str, secret_key: str) -> None:
        """Provide these keys."""
        self._credentials = Credentials(access_key, secret_key)

    @override
    def retrieve(self) -> Credentials:
        return self._credentials


class KeyFile(RenewableProvider):
    """Keys from a file that is read at every `retrieve`. To rotate keys, replace the file."""

    def __init__(self, path: str) -> None:
        """Remember the path. The file is not read yet."""
        self._path = path
        self._last: FileCredentials | None = None
        self._problem = ""

    def retrieve(self) -> Credentials:
        """Return the keys in the file. While it cannot be read, return the previous keys.

        Raises `ConfigError` if the file has never been readable.
        """
        problem = ""
        try:
            self._last = read_credentials(self._path)
        except ConfigError as error:
            if self._last is None:
                raise
            problem = str(error)
        if problem and problem != self._problem:
            log.warning(
                "cannot read the credentials file; the previous keys stay in use",
                extra={"fields": {"reason": problem}},
            )
        self._problem = problem
        return Credentials(*self._last, datetime.now(UTC) + FILE_LIFETIME)


class HomeFile(providers.Provider):
    """One of minio-py's files in the home directory. Invalid content counts as no credentials."""

    def __init__(self, make: Callable[[], providers.Provider]) -> None:
        """Look up the home directory later, because a container's user may have none."""
        self._make = make

    def retrieve(self) -> Credentials:
        """Return the file's credentials. Raises `ValueError`."""
        try:
            return self._make().retrieve()
        except (RuntimeError, AttributeError, TypeError, configparser.Error) as error:
            raise ValueError(f"no credentials in the home directory: {error}") from error


class StandardChain(RenewableProvider):
    """Queries minio-py's sources in its order, but `renew` restarts the search."""

    def __init__(self) -> None:
        """Prepare the sources. None is queried yet."""
        self.renew()

    def renew(self) -> None:
        """Start again with the first source."""
        self._chain = providers.ChainedProvider(
            [
                providers.EnvMinioProvider(),
                providers.EnvAWSProvider(),
                HomeFile(providers.AWSConfigProvider),
                HomeFile(providers.MinioClientConfigProvider),
                providers.IamAwsProvider(http_client=ControlHttp()),
            ]
        )

    @override
    def retrieve(self) -> Credentials:
        return self._chain.retrieve()


class CertificateLogin(RenewableProvider):
    """Temporary keys that MinIO issues for an hour to a client with a trusted certificate."""

    advice = (
        "MinIO issues no keys for minio.cert_file: on MinIO, set MINIO_IDENTITY_TLS_ENABLE=on, put "
        "the certificate's authority into certs/CAs, and add a policy whose name is the "
        "certificate's common name"
    )

    def __init__(self, config: MinioConfig) -> None:
        """Send no request yet. Raises `ConfigError` if the certificate cannot be loaded."""
        self._http = ControlHttp(config.connect_timeout, tls_context(config))
        self._urls = endpoint_urls(config)
        self.renew()

    def renew(self) -> None:
        """Log in again at the next `retrieve`."""
        self._logins = [
            providers.CertificateIdentityProvider(sts_endpoint=url, http_client=self._http)
            for url in self._urls
        ]

    def retrieve(self) -> Credentials:
        """Log in at the first server that issues keys. Raises the error of the last server."""
        for login in self._logins[:-1]:
            with suppress(HTTPError, ValueError):  # minio-py raises this for a refusal
                return login.retrieve()
        return self._logins[-1].retrieve()


def make_provider(config: MinioConfig) -> RenewableProvider:
    """Return the credential source that the settings name."""
    if config.certificate_login:
        return CertificateLogin(config)
    if config.credentials_file:
        return KeyFile(config.credentials_file)
    if config.access_key or config.secret_key:
        return StaticKeys(config.access_key, config.secret_key)
    return StandardChain()
