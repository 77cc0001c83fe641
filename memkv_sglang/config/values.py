"""Convert a value from a file, variable or flag to the type of its setting."""

import math
import os.path
from pathlib import Path
from typing import Any

import msgspec

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import split_paths
from memkv_sglang.config.settings import Setting
from memkv_sglang.config.suggest import suggestion
from memkv_sglang.config.units import (
    MAX_SIZE,
    MAX_TIME,
    SIZE_UNITS,
    TIME_UNITS,
    parse_size,
    parse_time,
)

MAX_COUNT = 10**12
"""Maximum of settings without a unit."""

_MAX_ECHO = 60

_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
_UNIT_WANTED = {
    "bytes": "a size such as 512MB or 100GiB",
    "seconds": "a time such as 250ms, 2s or 1h",
}
_LIMITS: dict[str | None, float] = {"bytes": MAX_SIZE, "seconds": MAX_TIME}
_UNITS = {"bytes": SIZE_UNITS, "seconds": TIME_UNITS}


def convert_value(setting: Setting, value: Any, name: str, directory: Path) -> Any:
    """Return the value in the setting's type, in bytes or seconds, checked against its range.

    Strings are parsed; other values must already have the setting's type.

    Args:
        setting: the setting.
        value: the value from a TOML file, or a string.
        name: the setting as the user wrote it, for messages.
        directory: base of relative paths.

    Raises:
        ConfigError: the value has the wrong type, unit or range.

    """
    if setting.secret:
        return _secret(value, name)
    if setting.unit == "paths" and isinstance(value, list):
        value = _join_paths(value, name)
    parsed = _parse_unit(setting, value, name)
    try:
        result = msgspec.convert(parsed, setting.annotation, strict=not isinstance(parsed, str))
    except msgspec.ValidationError:
        raise ConfigError(f"{name}: {_echo(value)} {_complaint(setting, parsed, value)}") from None
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(f"{name}: {_echo(value)} {_complaint(setting, result, value)}")
    limit = _LIMITS.get(setting.unit, MAX_COUNT)
    if isinstance(result, int | float) and result > limit:
        raise ConfigError(
            f"{name}: {_echo(value)} is out of range; use at most {setting.show(limit)}"
        )
    if isinstance(result, str) and not result.isprintable():
        raise ConfigError(f"{name}: {_echo(value)} contains unprintable characters; remove them")
    if setting.unit == "path" and result:
        return _absolute(result, directory)
    if setting.unit == "paths":
        return ",".join(_absolute(path, directory) for path in split_paths(result))
    return result


def _absolute(path: str, directory: Path) -> str:
    return os.path.abspath(directory / os.path.expanduser(path))  # noqa: PTH100, PTH111 - also removes `..`, and never raises


def _join_paths(paths: list[Any], name: str) -> str:
    for path in paths:
        if not isinstance(path, str):
            raise ConfigError(f"{name}: {_echo(path)} is not text in quotes; quote each path")
        if "," in path:
            raise ConfigError(f"{name}: {_echo(path)} contains a comma; choose another path")
    return ",".join(paths)


def _secret(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: must be text in quotes")
    if not value:
        raise ConfigError(
            f"{name}: is empty; give it a value, or remove it to use the standard credential chain"
        )
    if not value.isprintable() or value != value.strip():
        raise ConfigError(
            f"{name}: begins or ends with a space or contains a line break; remove it"
        )
    return value


def _parse_unit(setting: Setting, value: Any, name: str) -> Any:
    if not isinstance(value, str) or setting.unit not in _UNITS:
        return value
    try:
        return parse_size(value) if setting.unit == "bytes" else parse_time(value)
    except ValueError:
        raise ConfigError(f"{name}: {_echo(value)} {_complaint(setting, value, value)}") from None


def _complaint(setting: Setting, parsed: Any, value: Any) -> str:
    """Describe what is wrong with the value, and which values are valid."""
    if setting.bounds and _is_number(setting, parsed):
        return f"is out of range; use {setting.range}"
    if setting.unit in _UNITS:
        units = ", ".join(_UNITS[setting.unit])
        return f"is not {_UNIT_WANTED[setting.unit]}; units are {units}"
    if setting.choices:
        hint = suggestion(str(value), setting.choices)
        return f"is not one of {setting.range}{hint}"
    allowed = f", {setting.range}" if setting.range else ""
    return f"is not {_WANTED[setting.type]}{allowed}"


def _is_number(setting: Setting, parsed: Any) -> bool:
    """Return whether the value has the right type, which means that it is out of range.

    If the setting has a unit, valid text was already parsed, so text is not a number here.
    """
    is_text = isinstance(parsed, str)
    if is_text and setting.unit in _UNITS:
        return False
    try:
        msgspec.convert(parsed, setting.type, strict=not is_text)
    except msgspec.ValidationError:
        return False
    return True


def _echo(value: Any) -> str:
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except ValueError:  # Python refuses to print integers with this many digits.
        text = "the number"
    return text if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]}..."
