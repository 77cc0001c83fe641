"""Return the complete settings of each shard of the MinIO tier."""

import json
from collections.abc import Sequence

from msgspec.structs import asdict, fields, replace

from memkv_sglang.config.schema import (
    REDACTED,
    SECRET,
    MinioConfig,
    ShardConfig,
    field_meta,
)

CREDENTIALS = ("access_key", "secret_key", "credentials_file")
CERTIFICATE = ("cert_file", "key_file")
GROUPS = (CREDENTIALS, CERTIFICATE)
"""Groups of settings. A shard takes all settings of a group from `[minio]`, or none of them."""

SECRETS = tuple(field.name for field in fields(ShardConfig) if field_meta(field).extra == SECRET)


def has_minio(config: MinioConfig) -> bool:
    """Return whether there is a MinIO tier."""
    return bool(config.endpoint or config.shards)


def shard_configs(config: MinioConfig) -> dict[str, MinioConfig]:
    """Return the complete settings of every shard by name; empty if there is no MinIO tier.

    With `endpoint`, there is a single entry, whose name is empty.
    """
    if config.endpoint:
        return {"": config}
    return {shard.name: _complete(config, shard) for shard in config.shards}


def own_settings(shard: ShardConfig) -> dict[str, str]:
    """Return a shard's own settings by name; it takes all others from `[minio]`."""
    own = {name: value for name, value in asdict(shard).items() if value and name != "name"}
    for group in GROUPS:
        if any(name in own for name in group):
            own.update({name: getattr(shard, name) for name in group})
    return own


def _complete(config: MinioConfig, shard: ShardConfig) -> MinioConfig:
    return replace(config, **own_settings(shard), shards=(), replicas=1)


def show_shards(shards: Sequence[ShardConfig]) -> str:
    """Return shards as a TOML array, without secrets; empty if there are none."""
    tables = [
        ", ".join(
            f"{name} = {json.dumps(REDACTED if name in SECRETS else value)}"
            for name, value in asdict(shard).items()
            if value
        )
        for shard in shards
    ]
    return "[" + ", ".join(f"{{{table}}}" for table in tables) + "]" if tables else ""
