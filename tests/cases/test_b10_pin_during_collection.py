"""A pin or a use during a collection keeps the pages, and a collection ends when it loses its
lease.
"""

import threading
import time
from collections.abc import Iterator

import pytest
from memkv_testbed.minio_server import MinioServer

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.retention.collector import LeaseHeldError
from memkv_sglang.tiers.minio.retention.collector import collect as collecting
from tests.cases.s3_servers import bucket_of
from tests.cli.cli_node import Run
from tests.cli.conftest import environ, run  # noqa: F401 - fixtures
from tests.collector.bucket import LIMIT, NAMESPACE, PAGE, Bucketful, deadline, limits
from tests.collector.test_collect import lease, pin


@pytest.fixture
def full(minio_config: MinioConfig, minio_server: MinioServer) -> Iterator[Bucketful]:
    with bucket_of(minio_config, minio_server) as found:
        yield found


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "REMOVERS", 1)
    monkeypatch.setattr(collecting, "REMOVED_AT_ONCE", 4)


@pytest.mark.parametrize("after", [0, 4, 8])
def test_a_pin_made_during_a_collection_keeps_its_pages(full: Bucketful, after: int) -> None:
    chain = full.spill_in_one_period(1, "chain", 12)
    full.wait_for_next_period(1, chain.keys())
    there: list[list[bool]] = []

    def step(what: str, done: int, _total: int | None) -> None:
        if what == "removed" and done == after and not there:
            there.append(full.there(chain))
            pin(full, chain, 3600)

    collection = full.collector(capacity=1, use_period=1).collect(step)
    assert full.there(chain) == there[0]
    assert collection.report.removed_pages == after
    assert not collection.satisfied


def test_a_page_used_during_a_collection_stays(full: Bucketful) -> None:
    chain = full.spill_in_one_period(1, "chain", 8)
    full.wait_for_next_period(1, chain.keys())
    used = chain.keys()[:2]

    def step(what: str, done: int, _total: int | None) -> None:
        if what == "removed" and done == 0:
            for key in used:  # as a touch does
                name = full.tier.control().names.page(key)
                copy_onto_itself(full, name)

    full.collector(capacity=1, use_period=1).collect(step)
    assert full.there(chain) == [True] * 2 + [False] * 6


def copy_onto_itself(full: Bucketful, name: str) -> None:
    from minio.commonconfig import REPLACE, CopySource

    bucket = full.config.bucket
    head = full.admin.stat_object(bucket, name).metadata or {}
    kept: dict[str, str | list[str] | tuple[str]] = {
        key: value for key, value in head.items() if key.lower().startswith("x-amz-meta-")
    }
    full.admin.copy_object(
        bucket, name, CopySource(bucket, name), metadata=kept, metadata_directive=REPLACE
    )


def test_a_lost_lease_ends_the_removal_before_the_next_batch(full: Bucketful) -> None:
    """The lease's holder was suspended for longer than its lease before the removal."""
    chain = full.spill("chain", 12)
    collector, own = full.tier.collector(limits(capacity=1, use_period=1, lease_ttl=5))
    own.acquire()
    other = lease(full, seconds=5)

    def step(what: str, done: int, _total: int | None) -> None:
        if what == "removed" and done == 4:
            own._renewed -= 5  # so much of its time has passed
            give_up = time.monotonic() + LIMIT
            while other.state().holder:
                assert time.monotonic() < give_up
                time.sleep(0.1)
            other.acquire()

    with pytest.raises(LeaseHeldError):
        collector.collect(step, hold=own.renew)
    assert sum(full.there(chain)) == 8
    other.renew()
    other.release(None)


def test_two_collectors_at_once_remove_each_page_once(full: Bucketful) -> None:
    """As if the lease had expired during the request."""
    chain = full.spill("chain", 24)
    second = MinioTier(full.config)
    try:
        assert second.lookup(chain, deadline()).length == 24
        settings = limits(capacity=10 * PAGE, use_period=1)
        collectors = [tier.collector(settings)[0] for tier in (full.tier, second)]
        threads = [
            threading.Thread(target=collector.collect, args=(lambda *_: None,))
            for collector in collectors
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
    finally:
        second.close()
    assert sum(full.there(chain)) == 9  # 95 % of the capacity: what one alone would leave


def test_pin_reports_missing_pages(full: Bucketful, run: Run) -> None:  # noqa: F811
    chain = full.spill("chain", 6)
    full.tier.describe(NAMESPACE)
    full.tier.remove(chain.keys()[4:])
    hashes = ",".join(page.hex() for page in chain.hashes)
    outcome = run("pin", "--chain", hashes, "--for", "1h")
    assert outcome.status == 0
    assert "2 of 6 pages are not in the bucket, starting with page 4" in outcome.err
    assert chain.hashes[4].hex() in outcome.err


def test_pin_waits_for_a_removal_that_has_not_seen_it(
    full: Bucketful,
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pin checks its pages only after it has been written, and reports the missing ones."""
    chain = full.spill("chain", 4)
    full.tier.describe(NAMESPACE)
    held = lease(full)
    held.acquire()
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        full.tier.remove(chain.keys())

    monkeypatch.setattr("memkv_sglang.cli.pin.time.sleep", sleep)
    outcome = run("pin", "--chain", ",".join(page.hex() for page in chain.hashes), "--for", "1h")
    held.release(None)
    assert waited == [collecting.REMOVE_SECONDS]
    assert "4 of 4 pages are not in the bucket" in outcome.err
