"""The format record, which names a bucket's layout. Other layouts are refused, never misread."""

import re
from collections.abc import Callable
from typing import Annotated

import msgspec

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE
from memkv_sglang.tiers.base import TierError
from memkv_sglang.tiers.minio.admin import Bucket
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention.records import Records

FORMAT = 2
"""Version of the layout of objects in the bucket."""

SHARDS = 16
"""Default number of shards of the index. It keeps the memory of a collection below 150 MB for up to
16 million pages."""

SHARD_LIMIT = 256

RENEW_AFTER = 86400.0
"""Seconds after which records are written again, so that no lifecycle rule expires them."""

SIZE_LIMIT = 4096
"""Maximum size of the record, in bytes."""

_NAMESPACE = re.compile(rf"[0-9a-f]{{{2 * NAMESPACE_DIGEST_SIZE}}}")


class BucketFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The record as stored."""

    format: int = FORMAT
    shards: Annotated[int, msgspec.Meta(ge=1, le=SHARD_LIMIT)] = SHARDS
    """Number of shards of the index; a power of two."""
    days: Annotated[int, msgspec.Meta(ge=0, le=36500)] = 0
    """Days after which the bucket's lifecycle rule removes objects; 0 if it has no such rule."""

    def valid(self) -> bool:
        """Return whether the number of shards divides the slices of a log evenly."""
        return self.shards & (self.shards - 1) == 0


def read_format(records: Records, names: ObjectNames) -> BucketFormat | None:
    """Return the format of a bucket; None if it has no record.

    Raises `ConfigError` for a format of another version, and `TierError`.
    """
    # reading the record needs no time of the server
    content = records.content(names.format, SIZE_LIMIT)
    if content is None:
        return None
    try:
        found = msgspec.json.decode(content, type=BucketFormat)
    except (ValueError, RecursionError):
        found = None
    if found is None or not found.valid():
        raise ConfigError(
            f"minio.bucket: {names.format} is not a format record; choose another bucket or prefix"
        )
    if found.format != FORMAT:
        raise ConfigError(
            f"minio.bucket: the bucket has format {found.format}, and this version reads format "
            f"{FORMAT}; use the same version on all nodes"
        )
    return found


def ensure_format(
    records: Records, bucket: Bucket, names: ObjectNames, *, writable: bool
) -> BucketFormat:
    """Return the format of a bucket. Writes the record if the bucket has no pages.

    Raises `ConfigError` for a bucket of another format, and `TierError`.
    """
    found = read_format(records, names)
    if found is None:
        if has_pages(bucket, names):
            raise ConfigError(
                "minio.bucket: the bucket has pages of format 1, and this version uses format 2, "
                f"or its {names.format} was removed; run `memkv bucket rebuild`, which migrates "
                "and repairs it, or choose another bucket or prefix"
            )
        found = BucketFormat(shards=SHARDS)
        if writable:
            new = found
            found = write_format(records, names, lambda _: new)
    return found


def has_pages(bucket: Bucket, names: ObjectNames) -> bool:
    """Return whether there are folders of namespaces. Takes one request for up to 1,000 folders."""
    return any(_NAMESPACE.fullmatch(folder) for folder in bucket.folders(names.root))


def write_format(
    records: Records,
    names: ObjectNames,
    change: Callable[[BucketFormat | None], BucketFormat],
) -> BucketFormat:
    """Create or change the record; return what is stored afterwards, whichever node wrote it.

    `change` gets the present record, or None if there is none. Raises `ConfigError` and
    `TierError`.
    """
    record = records.read(names.format, SIZE_LIMIT)
    changed = change(read_format(records, names))
    over = record.version if record else None
    if records.write(names.format, msgspec.json.encode(changed), over) is not None:
        return changed
    found = read_format(records, names)  # another node was faster
    if found is None:
        raise TierError(f"could not write {names.format}: it was removed meanwhile; try again")
    return found


def renew_format(records: Records, names: ObjectNames, known: BucketFormat) -> None:
    """Write the record again if it is old. If it is gone, maybe with the bucket, write `known`.

    Raises `ConfigError` and `TierError`.
    """
    record = records.read(names.format, SIZE_LIMIT)
    if record is None or record.age > RENEW_AFTER:
        write_format(records, names, lambda found: found or known)
