"""Formats of a bucket, and rebuilding the index from a listing."""

import io

import msgspec
import pytest
from minio import Minio

from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention import BucketFormat
from tests.collector.bucket import LIMIT, NAMESPACE, PAGE, Bucketful, deadline

NAMES = ObjectNames("")


def remove_under(bucketful: Bucketful, *prefixes: str) -> None:
    for prefix in prefixes:
        for item in bucketful.admin.list_objects(
            bucketful.config.bucket, prefix=prefix, recursive=True
        ):
            bucketful.admin.remove_object(bucketful.config.bucket, item.object_name or "")


def rebuild(config: MinioConfig, step: object = None) -> tuple[int, int, int]:
    tier = MinioTier(config, any_format=True)
    try:
        done = tier.retention.rebuilder(CollectorConfig()).run(step or (lambda *_: None))  # type: ignore[arg-type]
    finally:
        tier.close()
    return done.pages, done.foreign, done.resumed


def test_a_bucket_of_format_1_is_refused_until_it_is_rebuilt(bucketful: Bucketful) -> None:
    chain = bucketful.spill_in_one_period(1, "chain", 8)
    bucketful.tier.describe(NAMESPACE)
    bucketful.tier.close()
    remove_under(bucketful, "memkv.json", "logs/", "shards/", "index/", "collector/")
    old = MinioTier(bucketful.config)
    with pytest.raises(ConfigError, match="memkv bucket rebuild"):
        old.check(deadline())
    old.close()
    assert rebuild(bucketful.config)[0] == 8
    new = bucketful._replace(tier=MinioTier(bucketful.config))
    try:
        assert new.tier.lookup(chain, deadline()).length == 8
        assert new.collect(capacity=5 * PAGE, use_period=1).report.pages == 4
        assert new.tier.clear(NAMESPACE.digest) == 4
    finally:
        new.tier.close()


def test_a_bucket_that_was_emptied_by_hand_keeps_its_number_of_shards(
    bucketful: Bucketful,
) -> None:
    """The next round writes the record of the format again, so that other nodes can join."""
    bucketful.tier.close()
    remove_under(bucketful, "")
    record = msgspec.json.encode(BucketFormat(shards=8))
    bucketful.admin.put_object(
        bucketful.config.bucket, NAMES.format, io.BytesIO(record), len(record)
    )
    node = bucketful._replace(tier=MinioTier(bucketful.config))
    try:
        node.spill("before", 4)
        node.collect(capacity=100 * PAGE, use_period=1)
        remove_under(bucketful, "")
        chain = node.spill("after", 8)
        assert node.collect(capacity=5 * PAGE, use_period=1).report.pages == 4
        other = MinioTier(bucketful.config)
        try:
            other.check(deadline())
            assert other.retention.parts().format.shards == 8
            assert other.lookup(chain, deadline()).length == 4
        finally:
            other.close()
    finally:
        node.tier.close()


def test_a_rebuild_without_the_format_record_keeps_the_number_of_shards(
    bucketful: Bucketful,
) -> None:
    bucketful.tier.close()
    record = msgspec.json.encode(BucketFormat(shards=8))
    place = bucketful.config.bucket, NAMES.format
    bucketful.admin.put_object(*place, io.BytesIO(record), len(record))
    node = bucketful._replace(tier=MinioTier(bucketful.config))
    node.spill("chain", 12)
    node.collect(capacity=100 * PAGE)
    node.tier.close()
    bucketful.admin.remove_object(*place)
    assert rebuild(bucketful.config)[0] == 12
    again = bucketful._replace(tier=MinioTier(bucketful.config))
    try:
        assert again.tier.retention.parts().format.shards == 8
        assert again.collect(capacity=8 * PAGE).report.pages == 7
    finally:
        again.tier.close()


def test_a_rebuild_continues_and_leaves_foreign_objects(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 12)
    foreign = f"{chain.namespace.hex()}/ab/{'ab' * 32}"
    bucketful.admin.put_object(bucketful.config.bucket, foreign, io.BytesIO(b"x"), 1)
    remove_under(bucketful, "logs/", "shards/", "index/")

    def interrupt(what: str, done: int, _total: int | None) -> None:
        if what == "shards" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rebuild(bucketful.config, interrupt)
    pages, _, resumed = rebuild(bucketful.config)
    assert (pages, resumed) == (12, 2)
    assert bucketful.collect(capacity=1, use_period=1).report.pages == 0
    assert bucketful.admin.stat_object(bucketful.config.bucket, foreign).size == 1


def test_a_rebuild_repairs_a_lost_part(bucketful: Bucketful) -> None:
    bucketful.spill("chain", 12)
    bucketful.collect(capacity=100 * PAGE, use_period=1)
    remove_under(bucketful, "index/")
    assert rebuild(bucketful.config)[0] == 12
    assert bucketful.collect(capacity=10 * PAGE, use_period=1).report.pages == 9


@pytest.mark.parametrize(
    "content", [b"", b'{"format":3}', b'{"format":2,"shards":3}', b"[1]", b'{"shards":-1}']
)
def test_another_format_is_refused(node_config: MinioConfig, admin: Minio, content: bytes) -> None:
    admin.put_object(node_config.bucket, "memkv.json", io.BytesIO(content), len(content))
    tier = MinioTier(node_config)
    try:
        with pytest.raises(ConfigError, match=r"minio\.bucket"):
            tier.check(deadline())
    finally:
        tier.close()


def test_pages_in_use_are_renewed_before_the_lifecycle_rule_removes_them(
    bucketful: Bucketful,
) -> None:
    used = bucketful.spill("used", 2)
    bucketful.spill("unused", 2)
    bucketful.wait_for_next_period(1)
    before = [bucketful.modified(key) for key in used.keys()]
    parts = bucketful.tier.retention.parts()
    found = [part for log in parts.logs.listed() for part in parts.logs.read([log], 0, 256)]
    day, now = 86400, int(before[0]) + 25 * 86400
    for part in found:
        for row in part.copy():
            is_used = bytes(row["key"])[16:48] in {page[:32].rstrip(b"\0") for page in used.hashes}
            one = part[:1].copy()
            one["key"], one["written"] = row["key"], int(before[0])
            one["used"] = now - day if is_used else int(before[0])
            parts.renewer.renew(one, 30, now)
    assert all(bucketful.modified(key) > old for key, old in zip(used.keys(), before, strict=True))
    fresh = MinioTier(bucketful.config)
    try:
        assert fresh.lookup(used, deadline()).length == 2
    finally:
        fresh.close()
    assert parts.telemetry.counts()["renewed_pages"] >= 2
    assert LIMIT
