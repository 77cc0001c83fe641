"""Prepares a bucket for pages, which an administrator does once, through minio-py.

A lifecycle rule backs up the collector: it expires pages that were unused for a long time, even if
no agent runs. Versions and locks would keep deleted pages, so deleting them would free no space.
"""

from typing import TYPE_CHECKING, NamedTuple

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.http import control_error
from memkv_sglang.tiers.minio.names import ObjectNames

if TYPE_CHECKING:
    from minio import Minio
    from minio.lifecycleconfig import LifecycleConfig, Rule

NO_LOCK = "ObjectLockConfigurationNotFoundError"
NO_LIFECYCLE = "NoSuchLifecycleConfiguration"

OLD_VERSION_DAYS = 1
"""How long a versioned bucket keeps deleted objects, in days."""


class BucketSetup(NamedTuple):
    """The result of `set_up`."""

    made: bool
    versioning: str
    """`Off`, `Enabled` or `Suspended`."""
    locked: bool
    """Whether objects can be locked, so that deleting them may free no space."""


def set_up(client: "Minio", config: MinioConfig, days: int) -> BucketSetup:
    """Create the bucket if it does not exist, and expire pages that were unused for `days` days.

    Keeps other lifecycle rules. Needs an administrator's client. Raises `TierError`.
    """
    name = config.bucket
    try:
        made = not client.bucket_exists(name)
        if made:
            client.make_bucket(name, config.region)
        locked = _is_locked(client, name)
        versioning = client.get_bucket_versioning(name).status or "Off"
        versioned = versioning != "Off"
        client.set_bucket_lifecycle(name, _with_rule(client, config, days, versioned=versioned))
    except Exception as error:  # minio-py raises many types for a malformed response
        reason = control_error(endpoint_urls(config)[0], error, "an administrator's keys")
        raise TierError(f"could not set up bucket {name}: {reason}") from error
    return BucketSetup(made, versioning, locked)


def _is_locked(client: "Minio", name: str) -> bool:
    from minio.error import S3Error

    try:
        client.get_object_lock_config(name)
    except S3Error as error:
        if error.code == NO_LOCK:
            return False
        raise
    return True


def _with_rule(
    client: "Minio", config: MinioConfig, days: int, *, versioned: bool
) -> "LifecycleConfig":
    from minio.error import S3Error
    from minio.lifecycleconfig import LifecycleConfig

    own = _rule(config, days, versioned=versioned)
    try:
        present = client.get_bucket_lifecycle(config.bucket)
    except S3Error as error:
        if error.code != NO_LIFECYCLE:
            raise
        present = None
    others = [rule for rule in (present.rules if present else []) if rule.rule_id != own.rule_id]
    return LifecycleConfig([*others, own])


def _rule(config: MinioConfig, days: int, *, versioned: bool) -> "Rule":
    from minio.commonconfig import ENABLED, Filter
    from minio.lifecycleconfig import Expiration, NoncurrentVersionExpiration, Rule

    root = ObjectNames(config.prefix).root
    return Rule(
        ENABLED,
        rule_filter=Filter(prefix=root),
        rule_id="-".join(filter(None, ("memkv", root.strip("/").replace("/", "-")))),
        expiration=Expiration(days=days),
        noncurrent_version_expiration=(
            NoncurrentVersionExpiration(noncurrent_days=OLD_VERSION_DAYS) if versioned else None
        ),
    )
