"""Where the keys that sign requests come from, and how new ones replace them without a restart.

Imports minio-py, which is slow: import this late.
"""

import configparser
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from minio.credentials import providers
from minio.credentials.credentials import Credentials
from urllib3.exceptions import HTTPError

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio.auth.credentials_file import FileCredentials, read_credentials
from memkv_sglang.tiers.minio.http import tls_context
from memkv_sglang.tiers.minio.http.control import ControlHttp

log = logging.getLogger(__name__)

FILE_LIFETIME = timedelta(seconds=15)
"""How long a file's content is used before it is read again; minio-py takes 10 s off of it."""


class RenewableProvider(providers.Provider):
    """A provider that can be told that its credentials were refused."""

    advice = (
        "no credentials for MinIO: set MEMKV_MINIO_ACCESS_KEY and MEMKV_MINIO_SECRET_KEY, or one "
        "of minio-py's sources"
    )
    """What to say where there are none."""

    def renew(self) -> None:
        """Let the next `retrieve` ask the source again."""


class StaticKeys(RenewableProvider):
    """The settings' own keys, which last as long as the process."""

    def __init__(self, access_key: str, secret_key: str) -> None:
        """Return these."""
        self._credentials = Credentials(access_key, secret_key)

    def retrieve(self) -> Credentials:
        """Return the keys."""
        return self._credentials


class KeyFile(RenewableProvider):
    """A file that is read at every `retrieve`, so that whoever rotates keys just replaces it."""

    def __init__(self, path: str) -> None:
        """Read nothing yet."""
        self._path = path
        self._last: FileCredentials | None = None
        self._complaint = ""

    def retrieve(self) -> Credentials:
        """Return the file's keys; while it cannot be read, those before. Raises `ConfigError`."""
        complaint = ""
        try:
            self._last = read_credentials(self._path)
        except ConfigError as error:
            if self._last is None:
                raise
            complaint = str(error)
        if complaint and complaint != self._complaint:
            log.warning("credentials not read again", extra={"fields": {"reason": complaint}})
        self._complaint = complaint
        return Credentials(*self._last, datetime.now(UTC) + FILE_LIFETIME)


class HomeFile(providers.Provider):
    """One of minio-py's files in the home directory; bad content counts as no credentials."""

    def __init__(self, make: Callable[[], providers.Provider]) -> None:
        """Look for the home directory only when asked: a container's user may have none."""
        self._make = make

    def retrieve(self) -> Credentials:
        """Return the file's credentials. Raises `ValueError`."""
        try:
            return self._make().retrieve()
        except (RuntimeError, AttributeError, TypeError, configparser.Error) as error:
            raise ValueError(f"no credentials in the home directory: {error}") from error


class StandardChain(RenewableProvider):
    """minio-py's sources in its order. It would hold on to what it found first."""

    def __init__(self) -> None:
        """Ask none yet."""
        self.renew()

    def renew(self) -> None:
        """Begin with the first source again."""
        self._chain = providers.ChainedProvider(
            [
                providers.EnvMinioProvider(),
                providers.EnvAWSProvider(),
                HomeFile(providers.AWSConfigProvider),
                HomeFile(providers.MinioClientConfigProvider),
                providers.IamAwsProvider(http_client=ControlHttp()),
            ]
        )

    def retrieve(self) -> Credentials:
        """Ask the sources until one has credentials."""
        return self._chain.retrieve()


class CertificateLogin(RenewableProvider):
    """Keys that MinIO lends for an hour to whoever presents a certificate it trusts."""

    advice = (
        "MinIO lends no keys for minio.cert_file: turn its MINIO_IDENTITY_TLS_ENABLE on, put the "
        "certificate's authority into certs/CAs, and add a policy named as its common name"
    )

    def __init__(self, config: MinioConfig) -> None:
        """Ask nothing yet. Raises `ConfigError`: no certificate to present."""
        self._http = ControlHttp(config.connect_timeout, tls_context(config))
        self._urls = endpoint_urls(config)
        self.renew()

    def renew(self) -> None:
        """Log in anew."""
        self._logins = [
            providers.CertificateIdentityProvider(sts_endpoint=url, http_client=self._http)
            for url in self._urls
        ]

    def retrieve(self) -> Credentials:
        """Ask one server after the other. Raises what the last one met."""
        for login in self._logins[:-1]:
            with suppress(HTTPError, ValueError):  # what minio-py raises for a refusal
                return login.retrieve()
        return self._logins[-1].retrieve()


def make_provider(config: MinioConfig) -> RenewableProvider:
    """Return where the settings say that credentials come from."""
    if config.certificate_login:
        return CertificateLogin(config)
    if config.credentials_file:
        return KeyFile(config.credentials_file)
    if config.access_key or config.secret_key:
        return StaticKeys(config.access_key, config.secret_key)
    return StandardChain()
