"""Prepare a bucket for pages, which an administrator does once. Uses minio-py.

A lifecycle rule expires pages that were unused for a long time, even if no agent collects. Versions
and locks would keep deleted pages, so deleting them would free no space.
"""

from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from memkv_sglang.config.check import endpoint_urls
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin.bucket import OFF, bucket_exists, is_unsupported
from memkv_sglang.tiers.minio.http import control_error
from memkv_sglang.tiers.minio.names import ObjectNames

if TYPE_CHECKING:
    from minio import Minio
    from minio.lifecycleconfig import LifecycleConfig, Rule

NO_LOCK = "ObjectLockConfigurationNotFoundError"
NO_LIFECYCLE = "NoSuchLifecycleConfiguration"

OLD_VERSION_DAYS = 1
"""Number of days for which a versioned bucket keeps deleted objects."""


class BucketSetup(NamedTuple):
    """The result of `set_up`."""

    made: bool
    versioning: str
    """Versioning of the bucket: `Off`, `Enabled` or `Suspended`."""
    locked: bool
    """Whether objects can be locked, so that deleting them may free no space."""
    expires: bool
    """Whether a lifecycle rule expires pages; False if the server has no such rules."""


class Features(NamedTuple):
    """What a bucket does with objects by itself."""

    locked: bool
    days: int | None
    """Number of days without use after which pages expire; None if there is no such rule."""


def set_up(client: "Minio", config: MinioConfig, days: int) -> BucketSetup:
    """Create the bucket if it does not exist, and expire pages that were unused for `days` days.

    Keeps other lifecycle rules. The server may lack object lock, versions or lifecycle rules. Needs
    an administrator's client. Raises `TierError`.
    """
    name = config.bucket
    try:
        made = not bucket_exists(client, name)
        if made:
            client.make_bucket(name, config.region)
        locked = _is_locked(client, name)
        versioning = _versioning(client, name)
        expires = _expire(client, config, days, versioned=versioning != OFF)
    except Exception as error:  # minio-py raises many types of exceptions for malformed responses
        reason = control_error(endpoint_urls(config)[0], error, "an administrator's keys")
        raise TierError(f"could not set up bucket {name}: {reason}") from error
    return BucketSetup(made, versioning, locked, expires)


def read_features(client: "Minio", config: MinioConfig) -> Features | None:
    """Return what the bucket does by itself; None if these credentials may not ask.

    Raises `TierError`.
    """
    from minio.error import S3Error

    try:
        return Features(_is_locked(client, config.bucket), _days(client, config))
    except Exception as error:  # minio-py raises many types of exceptions for malformed responses
        if isinstance(error, S3Error) and error.response.status == HTTPStatus.FORBIDDEN:
            return None
        reason = control_error(endpoint_urls(config)[0], error, "an administrator's keys")
        raise TierError(f"could not read the bucket's settings: {reason}") from error


def _is_locked(client: "Minio", name: str) -> bool:
    from minio.error import S3Error

    try:
        client.get_object_lock_config(name)
    except S3Error as error:
        if error.code == NO_LOCK or is_unsupported(error):
            return False
        raise
    return True


def _versioning(client: "Minio", name: str) -> str:
    from minio.error import S3Error

    try:
        return client.get_bucket_versioning(name).status or OFF
    except S3Error as error:
        if is_unsupported(error):
            return OFF
        raise


def _expire(client: "Minio", config: MinioConfig, days: int, *, versioned: bool) -> bool:
    """Set the lifecycle rule. Returns False if the server has no such rules."""
    from minio.error import S3Error

    try:
        rules = _with_rule(client, config, days, versioned=versioned)
        client.set_bucket_lifecycle(config.bucket, rules)
    except S3Error as error:
        if is_unsupported(error):
            return False
        raise
    return True


def _days(client: "Minio", config: MinioConfig) -> int | None:
    """Return the days after which this project's rule expires pages; None if there is no rule."""
    from minio.error import S3Error

    try:
        present = _lifecycle(client, config.bucket)
    except S3Error as error:
        if is_unsupported(error):
            return None
        raise
    own = [rule for rule in (present.rules if present else []) if rule.rule_id == _id(config)]
    return own[0].expiration.days if own and own[0].expiration else None


def _lifecycle(client: "Minio", name: str) -> "LifecycleConfig | None":
    from minio.error import S3Error

    try:
        return client.get_bucket_lifecycle(name)
    except S3Error as error:
        if error.code == NO_LIFECYCLE:
            return None
        raise


def _with_rule(
    client: "Minio", config: MinioConfig, days: int, *, versioned: bool
) -> "LifecycleConfig":
    from minio.lifecycleconfig import LifecycleConfig

    own = _rule(config, days, versioned=versioned)
    present = _lifecycle(client, config.bucket)
    others = [rule for rule in (present.rules if present else []) if rule.rule_id != own.rule_id]
    return LifecycleConfig([*others, own])


def _id(config: MinioConfig) -> str:
    """Return the id of this project's rule for a prefix."""
    root = ObjectNames(config.prefix).root
    return "-".join(filter(None, ("memkv", root.strip("/").replace("/", "-"))))


def _rule(config: MinioConfig, days: int, *, versioned: bool) -> "Rule":
    from minio.commonconfig import ENABLED, Filter
    from minio.lifecycleconfig import Expiration, NoncurrentVersionExpiration, Rule

    root = ObjectNames(config.prefix).root
    return Rule(
        ENABLED,
        rule_filter=Filter(prefix=root),
        rule_id=_id(config),
        expiration=Expiration(days=days),
        noncurrent_version_expiration=(
            NoncurrentVersionExpiration(noncurrent_days=OLD_VERSION_DAYS) if versioned else None
        ),
    )
