"""The tier's server flags: `--enable-memkv`, `--memkv-config` and one flag for each setting."""

import argparse
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

from memkv_sglang.config.settings import all_settings

ENABLE = "enable_memkv"
CONFIG = "memkv_config"
SETTINGS = "memkv_settings"
"""Field of the arguments with the settings by key. Patched `ServerArgs` has it, and a field for
each flag in `EVERYDAY`."""


class Flag(NamedTuple):
    """A flag that sets one of the agent's settings."""

    name: str
    """The flag as an argument name: `memkv_minio_bucket`."""
    key: str
    """The setting: `minio.bucket`."""


def argument_name(flag: str) -> str:
    """Return the name that argparse gives to a flag's value."""
    return flag.removeprefix("--").replace("-", "_")


SHORT = Flag("memkv_endpoint", "minio.endpoint")
"""The only setting with a second, shorter flag."""

FLAGS = tuple(
    Flag("memkv_" + argument_name(setting.flag), setting.key)
    for setting in all_settings()
    if not setting.secret
)

EVERYDAY = (
    SHORT,
    *(flag for flag in FLAGS if flag.key in ("nvme.directory", "nvme.capacity")),
)
"""The flags with which most servers are started."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's parser, with the agent's defaults in their help."""
    group = parser.add_argument_group(
        "memkv", "A tier below the host pool: pages go to local NVMe and to a shared MinIO."
    )
    group.add_argument(
        "--enable-memkv",
        action="store_true",
        help="Share the KV cache between nodes and keep it across restarts.",
    )
    group.add_argument(
        "--memkv-config",
        metavar="FILE",
        help="TOML file with any of the settings (docs/configuration.md). Flags and MEMKV_* "
        "variables override it.",
    )
    settings = {setting.key: setting for setting in all_settings()}
    for flag in FLAGS:
        setting = settings[flag.key]
        names = [SHORT.name, flag.name] if flag.key == SHORT.key else [flag.name]
        default = setting.show(setting.default) or "none"
        group.add_argument(
            *("--" + name.replace("_", "-") for name in names),
            dest=flag.name,
            metavar=setting.name.upper(),
            help=f"{setting.description} (default: {default})".replace("%", "%%"),
        )


def take_flags(values: MutableMapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Remove the tier's arguments from a server's; return the file and the settings by key."""
    values.pop(ENABLE, None)
    file = values.pop(CONFIG, None)
    return file, take_settings(values)


def take_settings(values: MutableMapping[str, Any]) -> dict[str, str]:
    """Remove the settings from a server's arguments and return them by key."""
    settings = dict(values.pop(SETTINGS, None) or {})
    for name, key in (*FLAGS, SHORT):
        value = values.pop(name, None)
        if value is not None:
            settings[key] = _text(value)
    return settings


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_enabled(values: Mapping[str, Any]) -> bool:
    """Return whether the server was started with `--enable-memkv`."""
    return bool(values.get(ENABLE))
