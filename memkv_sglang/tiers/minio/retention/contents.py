"""Find out what the index and the logs know of a namespace, without listing the bucket."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memkv_sglang.page import PAGE_HASH_SIZE
from memkv_sglang.tiers.minio.retention.parts import Parts
from memkv_sglang.tiers.minio.retention.shards import MissingPartError, Part, Shard

if TYPE_CHECKING:
    from memkv_sglang.tiers.minio.retention.entries import Entries

ATTEMPTS = 5
"""Maximum number of times that a shard is read again because another node has just replaced it."""

NO_LEASE = 60.0
"""Duration of a lease that is only read, never taken."""


def namespace_entries(parts: Parts, namespace: bytes) -> "Iterator[Entries]":
    """Yield the known pages of a namespace, shard by shard. Blocks. Raises `TierError`."""
    for number in range(parts.format.shards):
        shard = Shard(parts.records, parts.bucket, parts.names, number, NO_LEASE)
        for attempt in range(ATTEMPTS):
            try:
                yield _shard_entries(parts, shard, number, namespace)
                break
            except MissingPartError:
                if attempt == ATTEMPTS - 1:
                    raise


def _shard_entries(parts: Parts, shard: Shard, number: int, namespace: bytes) -> "Entries":
    from memkv_sglang.tiers.minio.retention.entries import merge

    width = 256 // parts.format.shards
    # List the logs before reading the record, because a log that was merged in between may be
    # removed.
    listed = parts.logs.listed()
    shard.read()
    merged = set(shard.state.logs)
    unmerged = [found for found in listed if found.name not in merged]
    updates = parts.logs.read(unmerged, number * width, (number + 1) * width)
    held = [shard.entries(part) for part in _overlapping(shard.state.parts, namespace)]
    return merge(*(_of_namespace(found, namespace) for found in [*held, *updates]))


def _overlapping(parts: Sequence[Part], namespace: bytes) -> list[Part]:
    """Return the parts that can hold pages of a namespace."""
    low, high = namespace.hex(), (namespace + b"\xff" * PAGE_HASH_SIZE).hex()
    found = []
    for i, part in enumerate(parts):
        following = parts[i + 1].first if i + 1 < len(parts) else None
        if part.first <= high and (following is None or following > low):
            found.append(part)
    return found


def _of_namespace(found: "Entries", namespace: bytes) -> "Entries":
    import numpy as np

    from memkv_sglang.tiers.minio.retention.entries import KEY_SIZE, chosen

    raw = np.ascontiguousarray(found["key"]).view(np.uint8).reshape(-1, KEY_SIZE)
    wanted = np.frombuffer(namespace, np.uint8)
    return chosen(found, (raw[:, : len(namespace)] == wanted).all(axis=1))
