"""A bucket in memory with a clock that tests set: histories of days take milliseconds."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from memkv_sglang.tiers.minio.admin import ObjectInfo
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.objects import Telemetry
from memkv_sglang.tiers.minio.retention import LogStore, Parts, PinStore
from memkv_sglang.tiers.minio.retention.bucket_format import BucketFormat
from memkv_sglang.tiers.minio.retention.records import Record

NAMES = ObjectNames("")


class Stored(NamedTuple):
    content: bytes
    modified: float

    @property
    def etag(self) -> str:
        return hashlib.md5(self.content + str(self.modified).encode()).hexdigest()


class MemoryBucket:
    """Stands for `Bucket` and `Records`; writes are atomic and conditional."""

    def __init__(self) -> None:
        self.stored: dict[str, Stored] = {}
        self.now = 1_800_000_000.0
        self.listed: set[str] = set()
        self.writes = 0

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        self.listed.add(prefix)
        for name in sorted(name for name in self.stored if name.startswith(prefix)):
            found = self.stored[name]
            yield ObjectInfo(name, len(found.content), found.modified, found.etag)

    def remove(self, names: Iterable[str], _seconds: float = 0.0) -> None:
        for name in list(names):
            self.stored.pop(name, None)

    def read(self, name: str, limit: int = 1 << 30) -> Record | None:
        found = self.stored.get(name)
        if found is None:
            return None
        content = found.content if len(found.content) <= limit else None
        return Record(content, found.etag, found.modified, self.now - found.modified)

    def content(self, name: str, _limit: int, span: tuple[int, int] | None = None) -> bytes | None:
        found = self.stored.get(name)
        if found is None:
            return None
        return found.content[span[0] : span[1]] if span else found.content

    def write(self, name: str, content: bytes, over: str | None) -> str | None:
        found = self.stored.get(name)
        if (found.etag if found else None) != over:
            return None
        self.put(name, content)
        return self.stored[name].etag

    def put(self, name: str, content: bytes) -> None:
        self.writes += 1
        # Two writes never have the same version, as with a server's clock.
        self.stored[name] = Stored(content, self.now + self.writes * 1e-6)

    def clock(self, _name: str) -> float:
        return self.now

    def heads(self, names: Sequence[str], _deadline: float) -> list[object]:
        raise AssertionError(f"nothing should look at {len(names)} objects one by one")

    def parts(self, shards: int) -> Parts:
        """Return what a collector of this bucket uses."""
        bucket: object = self
        telemetry = Telemetry()
        logs = LogStore(bucket, bucket, NAMES, telemetry)  # type: ignore[arg-type]
        pins = PinStore(bucket, bucket, NAMES)  # type: ignore[arg-type]
        return Parts(
            bucket,  # type: ignore[arg-type]
            bucket,  # type: ignore[arg-type]
            NAMES,
            logs,
            pins,
            _NoRenewals(),  # type: ignore[arg-type]
            telemetry,
            BucketFormat(shards=shards),
        )


class _NoRenewals:
    """Renews nothing: the bucket has no lifecycle rule."""

    def renew(self, found: object, _days: int, _now: float) -> object:
        return found
