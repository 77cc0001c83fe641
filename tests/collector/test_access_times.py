"""Access times in a real bucket."""

import io
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_page
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http.times import ServerClock
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.objects.telemetry import Telemetry
from memkv_sglang.tiers.minio.retention.access_time_updater import AccessTimeUpdater
from memkv_sglang.tiers.minio.retention.access_times import AccessTimeCache
from tests.collector.bucket import LIMIT, PAGE, Bucketful, deadline, limits


@pytest.fixture
def toucher(bucketful: Bucketful) -> Iterator[AccessTimeUpdater]:
    """Records uses without delay, in periods of one second."""
    bucketful.tier.control()
    toucher = AccessTimeUpdater(
        lambda: bucketful.tier._opened(deadline()).client,
        bucketful.config.bucket,
        ObjectNames(""),
        AccessTimeCache(1, ServerClock()),
        Telemetry(),
        delay=0,
    )
    yield toucher
    toucher.close()


def test_a_use_updates_root_and_leaf_and_keeps_all_metadata(
    bucketful: Bucketful, toucher: AccessTimeUpdater
) -> None:
    chain = bucketful.spill("chain", 5)
    before = [bucketful.modified(key) for key in chain.keys()]
    bucketful.wait_for_next_period(1, chain.keys())
    toucher.record_access(chain)
    assert toucher.flush(LIMIT)
    after = [bucketful.modified(key) for key in chain.keys()]
    assert min(after) > max(before)
    assert after == sorted(after)  # the root first: see collector/order.py
    fresh = MinioTier(bucketful.config)
    try:
        pages = [make_page(key, [PAGE], filled=False) for key in chain.keys()]
        assert fresh.load(pages, deadline()) == [LoadResult.LOADED] * 5
    finally:
        fresh.close()


def test_metadata_survives_unchanged(bucketful: Bucketful, toucher: AccessTimeUpdater) -> None:
    chain = bucketful.spill("chain", 1)
    name = ObjectNames("").page(chain.keys()[0])
    stored = {"memkv-format": "1", "memkv-length": "7", "memkv-checksum": "0" * 32}
    metadata = {**stored, "Memkv-Nonce": "AbC+/=xYz", "other": "Two Words"}
    bucketful.admin.put_object(
        bucketful.config.bucket,
        name,
        io.BytesIO(b"content"),
        7,
        "application/x-page",
        metadata=dict(metadata),
    )
    bucketful.wait_for_next_period(1, chain.keys())
    before = bucketful.admin.stat_object(bucketful.config.bucket, name)
    toucher.record_access(chain)
    assert toucher.flush(LIMIT)
    after = bucketful.admin.stat_object(bucketful.config.bucket, name)
    assert before.metadata is not None
    assert after.metadata is not None
    for field in ("x-amz-meta-memkv-nonce", "x-amz-meta-other", "content-type"):
        assert after.metadata[field] == before.metadata[field]
    assert before.last_modified is not None
    assert after.last_modified is not None
    assert after.last_modified > before.last_modified


def test_one_use_per_period_is_recorded(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 3)
    telemetry = Telemetry()
    toucher = AccessTimeUpdater(
        lambda: bucketful.tier._opened(deadline()).client,
        bucketful.config.bucket,
        ObjectNames(""),
        AccessTimeCache(1e9, ServerClock()),
        telemetry,
        delay=0,
    )
    try:
        for _ in range(3):
            toucher.record_access(chain)
            assert toucher.flush(LIMIT)
        assert "access_times_updated" not in telemetry.counts()  # they were written in this period
    finally:
        toucher.close()


def test_missing_pages_are_skipped(bucketful: Bucketful, toucher: AccessTimeUpdater) -> None:
    chain = bucketful.spill("chain", 3)
    bucketful.wait_for_next_period(1, chain.keys())
    before = bucketful.modified(chain.keys()[2])
    bucketful.tier.remove(chain.keys()[1:2])
    toucher.record_access(chain)
    assert toucher.flush(LIMIT)
    assert bucketful.there(chain) == [True, False, True]
    assert bucketful.modified(chain.keys()[2]) > before


def test_used_pages_outlive_unused_ones(bucketful: Bucketful, toucher: AccessTimeUpdater) -> None:
    used, unused = bucketful.spill("used", 4), bucketful.spill("unused", 4)
    bucketful.wait_for_next_period(1, [*used.keys(), *unused.keys()])
    toucher.record_access(used)
    assert toucher.flush(LIMIT)
    bucketful.wait_for_next_period(1, used.keys())
    bucketful.collect(capacity=5 * PAGE, use_period=1)
    assert all(bucketful.there(used))
    assert not any(bucketful.there(unused))


def test_a_tier_with_limits_records_uses(bucketful: Bucketful) -> None:
    chain: Chain = bucketful.spill("chain", 3)
    bucketful.wait_for_next_period(1, chain.keys())
    before = bucketful.modified(chain.keys()[0])
    tier = MinioTier(bucketful.config)
    try:
        tier.keep_limits(limits(use_period=1), Metrics(CollectorRegistry()), delay=0)
        tier.record_access(chain)
        assert tier._access_time_updater is not None
        assert tier._access_time_updater.flush(LIMIT)
    finally:
        tier.close()
    assert bucketful.modified(chain.keys()[0]) > before
