"""Compare the settings that an agent runs with to those of a client.

Secrets are compared by hashes, keyed with a nonce that the client chooses for each request.
"""

import hashlib
import os
import secrets
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

from memkv_sglang.agent.protocol import SettingsReport
from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import REDACTED, Config, MinioConfig, split_paths
from memkv_sglang.config.settings import Setting, all_settings
from memkv_sglang.config.shards import SECRETS, has_minio, shard_configs

CLIENT_ONLY = frozenset(
    {"agent.socket", "agent.autostart", "engine.prefill_speed", "engine.namespace_salt"}
)
"""Settings that are not compared, because the agent does not use them or the client has just used
them to reach the agent."""

AGENT_ONLY = frozenset(
    f"agent.{name}"
    for name in (
        *("http_address", "http_cert_file", "http_key_file", "http_token_file"),
        *("log_format", "log_requests"),
    )
)
"""Settings that are reported but not compared. They affect the agent's metrics port and log, and
make no difference to a server."""

CHAIN_VARIABLES = (
    "MINIO_ACCESS_KEY",
    "MINIO_SECRET_KEY",
    "MINIO_ROOT_USER",
    "MINIO_ROOT_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_ACCESS_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECRET_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
"""Environment variables that minio-py reads credentials from. Treated as secrets."""


class Difference(NamedTuple):
    """A setting in which the agent differs from a client."""

    key: str
    running: str
    """The agent's value, as written in a configuration file; empty for secrets."""
    wanted: str

    def __str__(self) -> str:
        if not self.running:
            return f"{self.key}: the agent runs with another value"
        return f"{self.key}: the agent runs with {self.running}, here it is {self.wanted}"


def make_nonce() -> bytes:
    """Return a random key for the hashes of secrets."""
    return secrets.token_bytes(32)


def report_settings(config: Config, environ: Mapping[str, str], nonce: bytes) -> SettingsReport:
    """Return the settings that the agent uses, with secrets hashed."""
    values = {
        setting.key: setting.value_in(config)
        for setting in all_settings()
        if not setting.secret and setting.key not in CLIENT_ONLY
    }
    hashes = {key: _hash(value, nonce) for key, value in _secrets(config, environ)}
    return SettingsReport(values, hashes)


class RunningSettings(NamedTuple):
    """An agent's reported settings, and the key of its secrets' hashes."""

    report: SettingsReport
    nonce: bytes

    def first_difference(
        self, config: Config, environ: Mapping[str, str], keys: Collection[str] | None = None
    ) -> Difference | None:
        """Return the first setting, in the schema's order, that differs from `config`.

        Ignores settings of tiers that neither side uses, and secrets that the client does not have.
        Compares only `keys` if given. Otherwise compares all settings, unless `config` has no tier:
        such a client cannot start an agent and accepts any.
        """
        if keys is None:
            if not (config.nvme.directory or has_minio(config.minio)):
                return None
            keys = {setting.key for setting in all_settings()} | set(CHAIN_VARIABLES)
            keys |= {key for key, _ in _secrets(config, environ)}
        differences = chain(self._plain(config, keys), self._secret(config, environ, keys))
        return next(differences, None)

    def _plain(self, config: Config, keys: Collection[str]) -> Iterator[Difference]:
        for setting in all_settings():
            if setting.secret or setting.key not in keys or setting.key in CLIENT_ONLY | AGENT_ONLY:
                continue
            running, wanted = self._value(setting), setting.value_in(config)
            if _is_used(setting, self.report.values, config) and not _agree(
                setting, running, wanted
            ):
                yield Difference(setting.key, _shown(setting, running), _shown(setting, wanted))

    def _secret(
        self, config: Config, environ: Mapping[str, str], keys: Collection[str]
    ) -> Iterator[Difference]:
        for key, value in _secrets(config, environ):
            if key in keys and self.report.secrets.get(key) != _hash(value, self.nonce):
                yield Difference(key, "", "")

    def _value(self, setting: Setting) -> Any:
        return self.report.values.get(setting.key, setting.default)

    def shown(self) -> dict[str, str]:
        """Return the settings whose values are not the defaults, by key, with secrets redacted."""
        shown = {}
        for setting in all_settings():
            if setting.key in self.report.secrets:
                shown[setting.key] = REDACTED
            elif not setting.secret and self._value(setting) != setting.default:
                shown[setting.key] = _shown(setting, self._value(setting))
        return shown


def _secrets(config: Config, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the secrets in the configuration, or the environment variables used in their place."""
    shards = shard_configs(config.minio)
    if not shards:
        return
    for setting in all_settings():
        if setting.secret and (value := setting.value_in(config)):
            yield setting.key, value
    for shard in config.minio.shards:
        for name in SECRETS:
            if value := getattr(shard, name):
                yield f"minio.shards.{shard.name}.{name}", value
    if not all(map(_has_keys, shards.values())):
        for variable in CHAIN_VARIABLES:
            if value := environ.get(variable, ""):
                yield variable, value


def _has_keys(minio: MinioConfig) -> bool:
    return bool(minio.access_key or minio.credentials_file or minio.certificate_login)


def _hash(secret: str, nonce: bytes) -> bytes:
    return hashlib.blake2b(os.fsencode(secret), key=nonce, digest_size=32).digest()


def _is_used(setting: Setting, running: Mapping[str, Any], config: Config) -> bool:
    """Return whether the agent or the client uses the tier that the setting belongs to."""
    if setting.section == "nvme":
        return bool(running.get("nvme.directory") or config.nvme.directory)
    if setting.section in ("minio", "collector"):
        used = running.get("minio.endpoint") or running.get("minio.shards")
        return bool(used or has_minio(config.minio))
    return True


def _agree(setting: Setting, running: Any, wanted: Any) -> bool:
    if running == wanted:
        return True
    if setting.key == "agent.http_port":
        return bool(wanted == 0)  # port 0 accepts any port
    if setting.key == "minio.endpoint":
        return _urls(running) == _urls(wanted)
    if setting.key == "minio.shards":
        return sorted(_tables(running)) == sorted(_tables(wanted))
    if setting.unit == "path" and running and wanted:
        return _same_path(str(running), str(wanted))
    if setting.unit == "paths" and running and wanted:
        return _same_paths(split_paths(str(running)), split_paths(str(wanted)))
    return False


def _urls(endpoint: Any) -> list[str]:
    return sorted(endpoint_urls(MinioConfig(endpoint=str(endpoint))))


def _same_paths(some: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether two lists name the same places, in any order."""
    return len(some) == len(others) and all(
        any(_same_path(one, other) for other in others) for one in some
    )


def _tables(shards: Any) -> list[str]:
    """Return the shards in a TOML array as texts, which the caller compares in any order."""
    return [str(table) for table in tomllib.loads(f"shards = {shards or '[]'}")["shards"]]


def _same_path(one: str, other: str) -> bool:
    """Return whether two paths lead to the same place, after following links and mounts."""
    with suppress(OSError):
        if os.path.samefile(one, other):  # noqa: PTH121 - the paths are text
            return True
    return os.path.realpath(one) == os.path.realpath(other)


def _shown(setting: Setting, value: Any) -> str:
    return setting.show(value) if value != "" else "nothing"
