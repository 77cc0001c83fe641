"""Where the keys that sign requests come from, and how new ones replace them without a restart.

Imports minio-py, which is slow: import this late.
"""

import logging
from datetime import UTC, datetime, timedelta

from minio.credentials import providers
from minio.credentials.credentials import Credentials

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio.control_http import bounded_http
from memkv_sglang.tiers.minio.credentials_file import FileCredentials, read_credentials

log = logging.getLogger(__name__)

FILE_LIFETIME = timedelta(seconds=15)
"""How long a file's content is used before it is read again; minio-py takes 10 s off of it."""


class RenewableProvider(providers.Provider):
    """A provider that can be told that its credentials were refused."""

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
                providers.AWSConfigProvider(),
                providers.MinioClientConfigProvider(),
                providers.IamAwsProvider(http_client=bounded_http()),
            ]
        )

    def retrieve(self) -> Credentials:
        """Ask the sources until one has credentials."""
        return self._chain.retrieve()


def make_provider(config: MinioConfig) -> RenewableProvider:
    """Return where the settings say that credentials come from."""
    if config.credentials_file:
        return KeyFile(config.credentials_file)
    if config.access_key or config.secret_key:
        return StaticKeys(config.access_key, config.secret_key)
    return StandardChain()
