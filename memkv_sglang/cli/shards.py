"""Find the buckets that a command acts on: a single one, or one per shard."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.config.shards import shard_configs
from memkv_sglang.config.suggest import suggestion

Command = TypeVar("Command", bound=Callable[..., Any])


def shard_option(command: Command) -> Command:
    """Add `--shard`. The command gets the name of the shard, or None, as `shard`."""
    add = click.option(
        "--shard", metavar="NAME", help="Act only on this shard. [default: on all of minio.shards]"
    )
    return add(command)


def bucket_configs(config: MinioConfig, shard: str | None = None) -> dict[str, MinioConfig]:
    """Return the settings of every bucket by shard. Without shards, the name is empty.

    `shard` selects one. Raises `ConfigError` if there is no bucket or no such shard.
    """
    configs = shard_configs(config)
    if not configs:
        raise ConfigError("minio.endpoint: is empty, so there is no bucket; set it")
    if shard is None:
        return configs
    if not config.shards:
        raise ConfigError("--shard: minio.shards is empty; leave it out")
    if shard not in configs:
        hint = suggestion(shard, configs, otherwise="known")
        raise ConfigError(f"--shard: there is no shard {shard[:40]!r}{hint}")
    return {shard: configs[shard]}


def tier_name(shard: str) -> str:
    """Return the name of a bucket's tier in tables and messages."""
    return f"minio/{shard}" if shard else "minio"


def prefixed(shard: str, text: str) -> str:
    """Return a line that begins with the name of the shard, if there are shards."""
    return f"shard {shard}: {text}" if shard else text
