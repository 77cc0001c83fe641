"""Parse the shards of the MinIO tier in a file, a variable or a flag."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import ShardConfig
from memkv_sglang.config.settings import PREFIX, settings_of
from memkv_sglang.config.shards import SECRETS
from memkv_sglang.config.suggest import suggestion
from memkv_sglang.config.values import convert_value

_SETTINGS = {setting.name: setting for setting in settings_of("minio.shards", ShardConfig)}

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")

_SECRET = re.compile(rf"{PREFIX}MINIO_SHARD_([A-Z0-9_]+)_({'|'.join(SECRETS).upper()})")

EXAMPLE = '[{name = "a", endpoint = "http://minio-a:9000"}]'


def is_shard_secret(variable: str) -> bool:
    """Return whether a variable holds a secret of one shard."""
    return _SECRET.fullmatch(variable) is not None


def convert_shards(value: Any, name: str, directory: Path) -> tuple[ShardConfig, ...]:
    """Return the shards in a TOML array or in its text. Raises `ConfigError`.

    `name` is the setting as the user wrote it; `directory` is the base of relative paths.
    """
    tables = _parse(value, name) if isinstance(value, str) else value
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{name}: must be an array of tables, e.g. {EXAMPLE}")
    return tuple(_shard(table, number, name, directory) for number, table in enumerate(tables, 1))


def has_secrets(value: Any) -> bool:
    """Return whether a value for `convert_shards` contains secrets."""
    if isinstance(value, str):
        return any(secret in value for secret in SECRETS)
    tables = value if isinstance(value, list) else []
    return any(table.get(name) for table in tables if isinstance(table, dict) for name in SECRETS)


def add_secrets(
    shards: tuple[ShardConfig, ...], variables: Mapping[str, str]
) -> tuple[ShardConfig, ...]:
    """Return the shards with the secrets in these variables. Raises `ConfigError`."""
    given = {shard.name.upper().replace("-", "_"): shard for shard in shards}
    for variable, value in variables.items():
        match = _SECRET.fullmatch(variable)
        assert match is not None
        if match[1] not in given:
            known = ", ".join(shard.name for shard in shards) or "none"
            raise ConfigError(f"{variable}: there is no such shard; unset it; shards: {known}")
        field = match[2].lower()
        secret = convert_value(_SETTINGS[field], value, variable, Path())
        given[match[1]] = replace(given[match[1]], **{field: secret})
    return tuple(given.values())


def _parse(text: str, name: str) -> Any:
    try:  # Errors must not quote the text, which may contain secrets.
        return tomllib.loads(f"shards = {text.strip() or '[]'}")["shards"]
    except (ValueError, RecursionError):
        raise ConfigError(f"{name}: is not a TOML array of tables; write e.g. {EXAMPLE}") from None


def _shard(table: dict[str, Any], number: int, name: str, directory: Path) -> ShardConfig:
    label = table.get("name")
    if not isinstance(label, str) or not _NAME.fullmatch(label):
        raise ConfigError(
            f"{name}: shard {number} needs a name of at most 32 characters of a-z, 0-9 and '-', "
            "with a letter or digit first and last; set its name"
        )
    values: dict[str, Any] = {}
    for key, value in table.items():
        called = f"{name}: shard {label}, {key}"
        if key not in _SETTINGS:
            hint = suggestion(key, _SETTINGS, otherwise="known")
            raise ConfigError(f"{called}: unknown setting of a shard{hint}")
        values[key] = convert_value(_SETTINGS[key], value, called, directory)
    return ShardConfig(**values)
