"""Load settings: defaults, then TOML files, then `MEMKV_*` variables, then flags. The last wins."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from memkv_sglang.config.check import check_config
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.private import (
    is_open_to_others,
    open_regular,
    parse_toml,
    read_bounded,
)
from memkv_sglang.config.schema import SHARDS, Config
from memkv_sglang.config.service_links import is_service_link, service_links_note
from memkv_sglang.config.settings import FILE_VARIABLE, Setting, all_settings, sections
from memkv_sglang.config.shard_values import (
    add_secrets,
    convert_shards,
    has_secrets,
    is_shard_secret,
)
from memkv_sglang.config.suggest import suggestion, unknown_key, unknown_variable
from memkv_sglang.config.values import convert_value

log = logging.getLogger(__name__)

SYSTEM_FILE = Path("/etc/memkv/config.toml")
"""The machine's configuration file."""

USER_FILE = Path("memkv/config.toml")
"""The user's configuration file, relative to `$XDG_CONFIG_HOME`."""


class Origin(NamedTuple):
    """Where a value comes from."""

    source: str
    """The file's path, the variable or the flag."""
    name: str
    """The setting as the user wrote it, for messages."""
    directory: Path
    """Directory that a relative path is relative to."""


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that passed `check_config`, and where its values come from."""

    config: Config
    origins: Mapping[str, Origin]
    """Origins of the values that are not defaults, by key (`nvme.capacity`)."""

    service_links: tuple[str, ...] = ()
    """Variables that were ignored because Kubernetes set them."""

    def name(self, key: str) -> str:
        """Return the setting's name as the user wrote it."""
        return self.origins[key].name if key in self.origins else key


class _Value(NamedTuple):
    value: Any
    origin: Origin


def load_config(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> Config:
    """Load and validate the configuration.

    Args:
        file: TOML file to read; None reads those that `config_files` returns.
        environ: environment variables; None uses this process's.
        overrides: values by key, e.g. `{"nvme.capacity": "100GiB"}`. They override everything else.

    Relative paths in a file are relative to that file, others to the current directory.

    Raises:
        ConfigError: the message is one line with the setting, the problem and the fix.

    """
    return load(file, os.environ if environ is None else environ, overrides or {}).config


def load(
    file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, str]
) -> LoadedConfig:
    """Load the configuration as `load_config` does, and record where each value comes from."""
    values: dict[str, _Value] = {}
    for path in config_files(environ) if file is None else [file]:
        values.update(_file_values(path))
    links = tuple(name for name, value in environ.items() if is_service_link(name, value))
    _log_service_links(links)
    shard_secrets = {k: v for k, v in environ.items() if is_shard_secret(k)}
    ignored = {*links, *shard_secrets}
    values.update(_variable_values({k: v for k, v in environ.items() if k not in ignored}))
    values.update(_flag_values(overrides))
    tables: dict[str, dict[str, Any]] = defaultdict(dict)
    for setting in all_settings():
        if setting.key in values:
            tables[setting.section][setting.name] = _convert(setting, values[setting.key])
    if shard_secrets:
        shards = tables["minio"].get("shards", ())
        tables["minio"]["shards"] = add_secrets(shards, shard_secrets)
    config = msgspec.convert(tables, Config)
    origins = {key: value.origin for key, value in values.items()}
    loaded = LoadedConfig(config, origins, links)
    check_config(config, loaded.name)
    return loaded


def config_files(environ: Mapping[str, str]) -> list[Path]:
    """Return the files to read when the caller names none; later ones override earlier ones.

    That is the file in `MEMKV_CONFIG`, or no file if the variable is empty. If the variable is not
    set, they are those of `/etc/memkv/config.toml` and `$XDG_CONFIG_HOME/memkv/config.toml` that
    exist.
    """
    if FILE_VARIABLE in environ:
        named = environ[FILE_VARIABLE]
        return [Path(named)] if named else []
    candidates = [SYSTEM_FILE]
    config_home, home = environ.get("XDG_CONFIG_HOME", ""), environ.get("HOME", "")
    if os.path.isabs(config_home):  # noqa: PTH117 - XDG: ignore a relative path
        candidates.append(Path(config_home, USER_FILE))
    elif os.path.isabs(home):  # noqa: PTH117
        candidates.append(Path(home, ".config", USER_FILE))
    # Unlike `Path.exists`, `lexists` never raises.
    return [path for path in candidates if os.path.lexists(path)]


@cache
def _log_service_links(links: tuple[str, ...]) -> None:
    """Log the ignored variables once per process."""
    if links:
        log.info("memkv: %s", service_links_note(links))


def _convert(setting: Setting, given: _Value) -> Any:
    origin = given.origin
    if setting.unit == SHARDS["unit"]:
        return convert_shards(given.value, origin.name, origin.directory)
    return convert_value(setting, given.value, origin.name, origin.directory)


def _file_values(file: Path) -> Iterator[tuple[str, _Value]]:
    document, is_open = _read(file)
    known = {setting.key: setting for setting in all_settings()}
    for section, table in document.items():
        if section not in sections():
            raise ConfigError(f"{section} in {file}: {_unknown_section(section, table)}")
        if not isinstance(table, dict):
            raise ConfigError(f"{section} in {file}: must be a table, [{section}]")
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in known:
                raise ConfigError(f"{key} in {file}: {unknown_key(key)}")
            if is_open and _is_secret(known[key], value):
                raise ConfigError(
                    f"{key} in {file}: other users can read the file; chmod 600 {file}, or "
                    f"set {known[key].variable}"
                )
            yield key, _Value(value, Origin(str(file), f"{key} in {file}", file.parent))


def _is_secret(setting: Setting, value: Any) -> bool:
    if setting.unit == SHARDS["unit"]:
        return has_secrets(value)
    return setting.secret and bool(value)


def _read(file: Path) -> tuple[dict[str, Any], bool]:
    """Return the file's tables, and whether other users can read it.

    Errors never quote the file, which may contain secrets.
    """
    with open_regular(str(file), "configuration file") as descriptor:
        is_open = is_open_to_others(os.fstat(descriptor))
        content = read_bounded(descriptor, str(file), "configuration file")
    try:
        return parse_toml(content), is_open
    except ValueError as error:
        raise ConfigError(f"{file}: {_unreadable(error)}") from None


def _unreadable(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text, as TOML must be; save it as UTF-8"
    return f"not valid TOML: {error}; fix the syntax, e.g. quote text"


def _unknown_section(name: str, value: object) -> str:
    if isinstance(value, dict):
        return f"unknown table{suggestion(name, sections(), otherwise='known')}"
    return "not in a table; move the setting into one of " + ", ".join(
        f"[{section}]" for section in sections()
    )


def _variable_values(environ: Mapping[str, str]) -> Iterator[tuple[str, _Value]]:
    known = {setting.variable: setting for setting in all_settings()}
    for variable, value in environ.items():
        if variable in known:
            origin = Origin(variable, variable, Path.cwd())
            yield known[variable].key, _Value(value, origin)
        elif problem := unknown_variable(variable):
            raise ConfigError(f"{variable}: {problem}")


def _flag_values(overrides: Mapping[str, str]) -> Iterator[tuple[str, _Value]]:
    known = {setting.key: setting for setting in all_settings()}
    for key, value in overrides.items():
        if key not in known:
            raise ConfigError(f"{key}: {unknown_key(key)}")
        setting = known[key]
        if setting.secret or (setting.unit == SHARDS["unit"] and has_secrets(value)):
            raise ConfigError(
                f"{setting.flag}: other users can read flags in the process list; set "
                f"{setting.variable}, or {key} in a file"
            )
        yield key, _Value(value, Origin(setting.flag, setting.flag, Path.cwd()))
