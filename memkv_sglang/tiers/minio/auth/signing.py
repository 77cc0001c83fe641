"""Sign request heads with credentials that may change at any time."""

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from memkv_sglang import __version__
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.auth.sigv4 import UNSIGNED, Template, request_date, template
from memkv_sglang.tiers.minio.http import (
    BackgroundCall,
    BulkTemplate,
    Endpoint,
    OutOfTimeError,
    TransferError,
)

if TYPE_CHECKING:
    from minio.credentials.credentials import Credentials

    from memkv_sglang.tiers.minio.auth.credentials import RenewableProvider

REFUSED = frozenset({400, 401, 403})
"""Statuses that can mean that the credentials are wrong, withdrawn or, with 400, expired."""

RENEW_PAUSE = 5.0
"""Minimum seconds between two attempts to replace refused credentials."""

NO_FIELDS: Mapping[str, str] = {}

_OPEN = "\0"
"""Stands for the value of the open field of a template; no other value can contain it."""

USER_AGENT = f"user-agent: sglang-memkv/{__version__}\r\n"


def credential_provider(config: MinioConfig) -> "RenewableProvider":
    """Return the credential source that the settings name. Imports minio-py, which is slow."""
    from memkv_sglang.tiers.minio.auth.credentials import make_provider

    return make_provider(config)


class _CachedTemplate(NamedTuple):
    """The template for requests of this second without extra fields: all requests but spills."""

    date: str
    credentials: "Credentials"
    template: Template


class Signer:
    """Writes signed request heads. Thread-safe."""

    def __init__(self, provider: "RenewableProvider", region: str) -> None:
        """Sign for a region with the provider's credentials. Blocks to retrieve them."""
        self._provider = provider
        self._region = region
        self._retrieval = BackgroundCall(self._retrieve)
        self._lock = threading.Lock()
        self._renewal: Future[Credentials] | None = None
        self._renew_at = 0.0
        self._templates: dict[tuple[str, Endpoint], _CachedTemplate] = {}
        self._credentials = self._retrieve()

    def credentials(self, deadline: float) -> "Credentials":
        """Return the current credentials. If they have expired, blocks on the provider.

        Raises `TransferError` if the provider has none, and `OutOfTimeError` at the deadline.
        """
        if self._credentials.is_expired():
            retrieval = self._retrieval.begin()
            try:
                retrieval.result(max(deadline - time.monotonic(), 0))
            except TimeoutError as error:
                raise OutOfTimeError("the deadline passed before credentials arrived") from error
            except TierError as error:
                raise TransferError(str(error)) from error
        return self._credentials

    def renew(self, refused: "Credentials", deadline: float) -> bool:
        """Replace credentials that the server refused; return whether they have changed.

        Queries the source at most once in `RENEW_PAUSE` seconds. Concurrent callers wait for the
        same query, until the deadline at most.
        """
        with self._lock:
            now = time.monotonic()
            if self._renewal is None or now >= self._renew_at:
                self._renew_at = now + RENEW_PAUSE
                self._provider.renew()
                self._renewal = self._retrieval.begin()
            renewal = self._renewal
        # other requests may be able to use the current ones
        with suppress(TimeoutError, TierError):
            renewal.result(max(deadline - time.monotonic(), 0))
        return _keys(self._credentials) != _keys(refused)

    def head(
        self,
        credentials: "Credentials",
        method: str,
        endpoint: Endpoint,
        path: str,
        fields: Mapping[str, str],
    ) -> bytes:
        """Return the signed head of a request for a quoted path. Field names are in lower case."""
        date = request_date()
        if fields:
            return self._template(credentials, method, endpoint, date, fields).head(path)
        cached = self._templates.get((method, endpoint))
        if cached is None or cached.date != date or cached.credentials is not credentials:
            template = self._template(credentials, method, endpoint, date, fields)
            cached = _CachedTemplate(date, credentials, template)
            self._templates[method, endpoint] = cached
        return cached.template.head(path)

    def template(
        self,
        credentials: "Credentials",
        method: str,
        endpoint: Endpoint,
        fields: Mapping[str, str] = NO_FIELDS,
        open_field: str = "",
    ) -> BulkTemplate:
        """Return what the fast path needs to sign requests with these extra fields.

        The fast path adds the field named `open_field`, if any, whose value differs from one
        request to the next. The template's date is the present time, which servers accept for some
        minutes.
        """
        if open_field:
            fields = {**fields, open_field: _OPEN}
        signed = self._template(credentials, method, endpoint, request_date(), fields)
        canonical, _, canonical_end = signed.canonical.partition(_OPEN)
        lines, _, lines_end = signed.lines.partition(_OPEN)
        return BulkTemplate(
            start=f"{method} {endpoint.base_path}".encode(),
            canonical=canonical.encode(),
            text=signed.text.encode(),
            key=signed.key,
            lines=lines.encode(),
            canonical_end=canonical_end.encode(),
            lines_end=lines_end.encode(),
        )

    def _template(
        self,
        credentials: "Credentials",
        method: str,
        endpoint: Endpoint,
        date: str,
        fields: Mapping[str, str],
    ) -> Template:
        signed = {
            "host": endpoint.netloc,
            "x-amz-content-sha256": UNSIGNED,
            "x-amz-date": date,
            **fields,
        }
        if credentials.session_token:
            signed["x-amz-security-token"] = credentials.session_token
        return template(
            method,
            signed,
            access_key=credentials.access_key,
            secret_key=credentials.secret_key,
            region=self._region,
            date=date,
            unsigned=USER_AGENT,
        )

    def _retrieve(self) -> "Credentials":
        try:
            self._credentials = self._provider.retrieve()
        except ConfigError:
            raise
        except Exception as error:  # each provider raises its own types of exceptions
            raise TierError(self._provider.advice) from error
        return self._credentials


def _keys(credentials: "Credentials") -> tuple[str, str, str | None]:
    return credentials.access_key, credentials.secret_key, credentials.session_token
