"""The flags of the tier: what they are called, and what they mean to the agent's configuration."""

import argparse
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple

from memkv_sglang.config.settings import all_settings


class Flag(NamedTuple):
    """A flag that stands for one of the agent's settings."""

    name: str
    """As `--memkv-endpoint` without the dashes in front, underscores for the others."""
    key: str
    """The setting: `minio.endpoint`."""


ENABLE = "enable_memkv"
CONFIG = "memkv_config"

FLAGS = (
    Flag("memkv_endpoint", "minio.endpoint"),
    Flag("memkv_bucket", "minio.bucket"),
    Flag("memkv_nvme_dir", "nvme.directory"),
    Flag("memkv_nvme_capacity", "nvme.capacity"),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's parser, with the defaults that the agent has for them."""
    group = parser.add_argument_group(
        "memkv", "A tier below the host pool: pages go to local NVMe and to a shared MinIO."
    )
    group.add_argument(
        "--enable-memkv", action="store_true", help="Share the KV cache over nodes and restarts."
    )
    group.add_argument(
        "--memkv-config",
        metavar="FILE",
        help="TOML file with any of the settings (docs/configuration.md); also MEMKV_* variables.",
    )
    settings = {setting.key: setting for setting in all_settings()}
    for flag in FLAGS:
        setting = settings[flag.key]
        default = setting.show(setting.default) or "none"
        group.add_argument(
            "--" + flag.name.replace("_", "-"),
            help=f"{setting.description} (default: {default})".replace("%", "%%"),
        )


def take_flags(values: MutableMapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """Take the tier's own values out of a server's, return the file and the settings by key."""
    values.pop(ENABLE, None)
    file = values.pop(CONFIG, None)
    given = {flag.key: values.pop(flag.name, None) for flag in FLAGS}
    return file, {key: str(value) for key, value in given.items() if value is not None}


def is_enabled(values: Mapping[str, Any]) -> bool:
    """Tell whether the server's values ask for the tier."""
    return bool(values.get(ENABLE))
