"""Collections of a real bucket, by a node with the permissions in `deploy/`."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from click import ClickException

from memkv_sglang.cli import output
from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_page
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult, TierError
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.admin import Bucket, ObjectInfo
from memkv_sglang.tiers.minio.http import ServerClock
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.retention import collector as collecting
from memkv_sglang.tiers.minio.retention import logs, shard_pass
from memkv_sglang.tiers.minio.retention.pins import Pin, PinStore
from memkv_sglang.tiers.minio.retention.records import Records
from memkv_sglang.tiers.minio.retention.rounds import Round
from memkv_sglang.tiers.minio.retention.shards import LeaseHeldError, Shard
from tests.collector.bucket import (
    LIMIT,
    NAMESPACE,
    PAGE,
    Bucketful,
    deadline,
    limits,
    prefix_length,
)

WAITING = "waiting for all nodes to log which pages they use"


def test_least_recently_used_pages_are_removed_down_to_the_capacity(bucketful: Bucketful) -> None:
    old = bucketful.spill_in_one_period(1, "old", 8)
    bucketful.wait_for_next_period(1)
    new = bucketful.spill("new", 8)
    bucketful.wait_for_next_period(1)
    collection = bucketful.collect(capacity=12 * PAGE, use_period=1)
    assert collection.satisfied
    assert collection.report.pages == 11  # at most 95 % of the capacity
    assert collection.report.bytes == 11 * PAGE
    assert collection.report.removed_pages == 5
    assert all(bucketful.there(new))
    assert prefix_length(bucketful.there(old)) == 3


def test_nothing_is_removed_below_the_capacity(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 4)
    report = bucketful.collect(capacity=4 * PAGE).report
    assert (report.pages, report.removed_pages) == (4, 0)
    assert all(bucketful.there(chain))


def test_limits_apply_to_our_prefix_only(bucketful: Bucketful) -> None:
    """A quota per tenant: each agent collects only its own prefix."""
    config = msgspec.structs.replace(bucketful.config, prefix="another")
    another = bucketful._replace(config=config, tier=MinioTier(config))
    try:
        mine, theirs = bucketful.spill("mine", 4), another.spill("theirs", 8)
        assert bucketful.collect(capacity=4 * PAGE).report.removed_pages == 0
        assert another.collect(capacity=4 * PAGE).report.removed_pages >= 4
        assert all(bucketful.there(mine))
        assert sum(another.there(theirs)) <= 4
    finally:
        another.tier.close()


def test_pages_beyond_the_maximum_age_are_removed(bucketful: Bucketful) -> None:
    old = bucketful.spill("old", 3)
    give_up = time.monotonic() + LIMIT
    while bucketful.collect(max_age=1, use_period=1).report.pages:
        assert time.monotonic() < give_up
    assert not any(bucketful.there(old))


def test_a_page_used_on_another_node_after_the_decision_stays(bucketful: Bucketful) -> None:
    """The other node logs the use late: after the decision, when it notices the round."""
    used, unused = bucketful.spill("used", 3), bucketful.spill("unused", 3)
    bucketful.wait_for_next_period(1)
    time.sleep(2)  # now both chains are older than the maximum age
    node = MinioTier(bucketful.config)
    try:
        node.check(deadline())

        def step(what: str, _done: int, _total: int | None) -> None:
            if what == WAITING:
                node.record_access(used, range(len(used.hashes)))
                assert node.flush_accesses(LIMIT)

        report = bucketful.collector(max_age=1, use_period=1).collect(step).report
    finally:
        node.close()
    assert report.removed_pages == 3
    assert all(bucketful.there(used))
    assert not any(bucketful.there(unused))


def test_a_use_is_not_lost_if_its_node_closes(bucketful: Bucketful) -> None:
    used, unused = bucketful.spill("used", 4), bucketful.spill("unused", 4)
    bucketful.wait_for_next_period(1)
    node = MinioTier(bucketful.config)
    node.check(deadline())
    node.record_access(used, range(len(used.hashes)))
    node.close()
    bucketful.collect(capacity=5 * PAGE, use_period=1)
    assert all(bucketful.there(used))
    assert not any(bucketful.there(unused))


def test_a_collection_lists_no_pages(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 8)
    prefixes: list[str] = []
    listing = Bucket.objects

    def objects(self: Bucket, prefix: str) -> Iterator[ObjectInfo]:
        prefixes.append(prefix)
        return listing(self, prefix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "objects", objects)
        bucketful.collect(capacity=4 * PAGE)
        bucketful.tier.clear(chain.namespace)
    assert prefixes
    assert set(prefixes) <= {"logs/", "pins/", "quarantine/"}
    assert not any(bucketful.there(chain))


def test_logs_are_removed_once_they_are_merged(bucketful: Bucketful) -> None:
    bucketful.spill("chain", 8)
    assert list(bucketful.admin.list_objects(bucketful.config.bucket, prefix="logs/"))
    bucketful.collect(capacity=100 * PAGE)
    assert not list(bucketful.admin.list_objects(bucketful.config.bucket, prefix="logs/"))


def test_a_dry_run_removes_nothing_and_reports_the_same(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 6)
    settings = {"capacity": 3 * PAGE}
    told = bucketful.collector(**settings).collect(lambda *_: None, dry_run=True).report
    assert all(bucketful.there(chain))
    assert bucketful.collect(**settings).report == told


def test_a_dry_run_leaves_a_removal_that_is_under_way_to_others(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 6)
    settings = {"capacity": 3 * PAGE}
    node = bucketful.collector(**settings)
    node.look()
    assert node.begin()
    while node.look().current.phase == "merge":
        node.advance(lambda *_: None)
    time.sleep(1.5)  # until the pages may be removed
    told = bucketful.collector(**settings).collect(lambda *_: None, dry_run=True).report
    assert all(bucketful.there(chain))
    while node.look().current.phase == "remove":
        node.advance(lambda *_: None)
    assert node.look().current.report == told
    assert told.removed_pages == 4


# Uses that no log has yet


def test_nothing_is_removed_before_all_logs_are_merged(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used, *others = [bucketful.spill(f"chain {i}", 4) for i in range(4)]
    bucketful.wait_for_next_period(1)
    node = MinioTier(bucketful.config)
    node.check(deadline())
    node.record_access(used, range(len(used.hashes)))
    node.close()  # writes the fifth log
    monkeypatch.setattr(logs, "LISTED_LIMIT", 2)
    settings = {"capacity": 5 * PAGE, "use_period": 1}
    assert bucketful.collect(**settings).report.removed_pages == 0
    assert "too many logs" in caplog.text
    for _ in others:  # the second and third rounds merge the other logs and remove pages
        report = bucketful.collect(**settings).report
    assert report.pages == 4
    assert all(bucketful.there(used))


@pytest.mark.parametrize("moment", [WAITING, "removed"])
def test_a_removal_stops_if_there_are_too_many_logs_to_read(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    chains = [bucketful.spill(f"chain {i}", 4) for i in range(2)]
    node = MinioTier(bucketful.config)
    node.check(deadline())

    def step(what: str, _done: int, _total: int | None) -> None:
        if what == moment:
            monkeypatch.setattr(logs, "LISTED_LIMIT", 1)
            for chain in chains:
                node.record_access(chain, range(len(chain.hashes)))
                assert node.flush_accesses(LIMIT)

    try:
        with pytest.raises(TierError, match="too many logs"):
            bucketful.collector(capacity=1).collect(step)
    finally:
        node.close()
    assert all(all(bucketful.there(chain)) for chain in chains)


def test_nothing_is_removed_by_a_node_that_cannot_write_its_log(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = bucketful.spill("chain", 4)

    def step(what: str, _done: int, _total: int | None) -> None:
        if what == WAITING:
            monkeypatch.setattr(logs.LogStore, "write", refuse)
            bucketful.tier.record_access(make_chain(NAMESPACE, 2, "used"), range(2))

    def refuse(*_: object) -> None:
        raise TierError("refused")

    collector = bucketful.collector(capacity=1, use_period=1)
    bucketful.wait_for_next_period(1)
    with pytest.raises(TierError, match="could not log which pages this node used"):
        collector.collect(step)
    assert all(bucketful.there(chain))


def test_a_lost_record_of_the_round_does_not_stop_collections(bucketful: Bucketful) -> None:
    for seed in ("first", "second"):
        bucketful.spill(seed, 8)
        report = bucketful.collect(capacity=4 * PAGE, use_period=1).report
        assert (report.pages, report.removed_pages) == (3, 5 if seed == "first" else 8)
        bucketful.admin.remove_object(bucketful.config.bucket, ObjectNames("").round)


@contextmanager
def clock_of_new_tiers(monkeypatch: pytest.MonkeyPatch, ahead: list[float]) -> Iterator[None]:
    """Give tiers created in the block a clock that is `ahead[0]` seconds ahead, now and later."""
    right = ServerClock.__init__.__defaults__
    assert right is not None
    with monkeypatch.context() as patch:
        clocks = (lambda: time.time() + ahead[0], *right[1:])
        patch.setattr(ServerClock.__init__, "__defaults__", clocks)
        yield


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_a_node_whose_clock_is_an_hour_off_removes_and_logs_nothing(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """A server that checks dates refuses its requests; this one does not."""
    settings = {"max_age": 1800, "use_period": 1}
    theirs, other = bucketful.spill("theirs", 3), make_chain(NAMESPACE, 3, "other")
    with clock_of_new_tiers(monkeypatch, [ahead]):
        node = bucketful._replace(tier=MinioTier(bucketful.config))
    try:
        pages = [make_page(key, [PAGE], filled=True) for key in other.keys()]
        assert node.tier.spill(pages, deadline()) == [SpillResult.STORED] * 3
        with pytest.raises(TierError, match="could not log"):
            node.collect(**settings)
        assert not node.tier.flush_accesses(2)
        # The node whose clock is right can collect.
        assert bucketful.collect(**settings).report.pages == 3
        results = node.tier.load(
            [make_page(k, [PAGE], filled=False) for k in theirs.keys()], deadline()
        )
        assert results == [LoadResult.LOADED] * 3
        assert all([*bucketful.there(theirs), *bucketful.there(other)])
    finally:
        node.tier.close()


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_a_clock_that_jumps_by_an_hour_changes_no_ages(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    settings, jump = {"max_age": 1800, "use_period": 1}, [0.0]
    theirs = bucketful.spill("theirs", 3)
    with clock_of_new_tiers(monkeypatch, jump):
        node = bucketful._replace(tier=MinioTier(bucketful.config))
    try:
        ours = node.spill("ours", 3)
        jump[0] = ahead
        assert node.collect(**settings).report.pages == 6
        assert bucketful.collect(**settings).report.pages == 6
        assert all([*bucketful.there(theirs), *bucketful.there(ours)])
    finally:
        node.tier.close()


def test_a_shard_of_many_parts_is_merged_in_order(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pass, "PART", 4)
    chains = [bucketful.spill_in_one_period(1, f"chain {i}", 40) for i in range(2)]
    bucketful.wait_for_next_period(1)
    assert bucketful.collect(capacity=100 * PAGE, use_period=1).report.pages == 80
    more = bucketful.spill("more", 40)
    assert bucketful.collect(capacity=60 * PAGE, use_period=1).report.pages == 57
    assert all(bucketful.there(more))
    assert sum(prefix_length(bucketful.there(chain)) for chain in chains) == 17


def test_page_removed_after_a_lookup_is_a_miss(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 6)
    reader = MinioTier(bucketful.config)
    try:
        assert reader.lookup(chain, deadline()) == Lookup(6, complete=True)
        bucketful.collect(capacity=1, use_period=1)
        pages = [make_page(key, [PAGE], filled=False) for key in chain.keys()]
        results = reader.load(pages, deadline())
        assert results[0] == LoadResult.MISSING
        assert set(results) <= {LoadResult.MISSING, LoadResult.SKIPPED}
        assert reader.lookup(chain, deadline()).length == 0
        stored = reader.spill([make_page(chain.keys()[0], [PAGE], filled=True)], deadline())
        assert stored == [SpillResult.STORED]  # the page can be stored again at once
    finally:
        reader.close()


def test_foreign_objects_are_left_alone(bucketful: Bucketful) -> None:
    bucketful.spill("chain", 3)
    bucketful.admin.put_object(bucketful.config.bucket, "notes/readme", io.BytesIO(b"x"), 1)
    assert bucketful.collect(capacity=1).report.pages == 0
    assert bucketful.admin.stat_object(bucketful.config.bucket, "notes/readme").size == 1


def test_pages_stored_during_a_collection_do_not_count_as_pinned(bucketful: Bucketful) -> None:
    bucketful.spill("before", 4)
    late = ["late"]

    def step(what: str, _done: int, _total: int | None) -> None:
        if what == WAITING and late:
            bucketful.spill(late.pop(), 6)

    collection = bucketful.collector(capacity=3 * PAGE).collect(step)
    assert collection.report.bytes > 3 * PAGE
    assert collection.satisfied


# Pins


def pin(bucketful: Bucketful, chain: Chain, seconds: float) -> Pin:
    made = Pin(
        namespaces=[chain.namespace.hex()],
        hashes=[page.hex() for page in chain.hashes],
        seconds=seconds,
    )
    PinStore(*bucketful.tier.access.control()).add(made)
    return made


def test_pinned_pages_stay_and_the_command_reports_the_missed_limit(
    bucketful: Bucketful,
) -> None:
    pinned, other = bucketful.spill("pinned", 5), bucketful.spill("other", 5)
    pin(bucketful, pinned, 3600)
    collection = bucketful.collect(capacity=2 * PAGE)
    assert not collection.satisfied
    assert collection.report.kept_pages == 5
    assert all(bucketful.there(pinned))
    assert not any(bucketful.there(other))


def test_a_pin_that_has_ended_keeps_nothing_and_is_removed(bucketful: Bucketful) -> None:
    chain = bucketful.spill("chain", 3)
    pin(bucketful, chain, 0)
    assert not bucketful.tier.read_pins()
    bucketful.collect(capacity=1)
    assert not any(bucketful.there(chain))
    assert PinStore(*bucketful.tier.access.control()).all() == []


def test_a_pin_that_could_not_be_read_again_is_not_written(bucketful: Bucketful) -> None:
    chain = make_chain(NAMESPACE, 65_000)
    with pytest.raises(TierError, match="pin a shorter prefix"):
        pin(bucketful, chain, 3600)
    assert PinStore(*bucketful.tier.access.control()).all() == []


# The lease


def lease(bucketful: Bucketful, seconds: float = 60) -> Shard:
    """Return a node's view of the first shard, whose record is its lease."""
    bucket, records, names = bucketful.tier.access.control()
    return Shard(records, bucket, names, 0, seconds)


def test_one_of_two_nodes_collects_a_shard_at_a_time(bucketful: Bucketful) -> None:
    one, two = lease(bucketful), lease(bucketful)
    one.acquire()
    with pytest.raises(LeaseHeldError, match="is collecting"):
        two.acquire()
    assert two.read()
    one.release()
    two.acquire()
    two.release()


@pytest.mark.parametrize("content", [b"", b"no record", b'{"holder": "\xff"}', b"[1]"])
def test_an_invalid_record_of_a_shard_is_reported_and_overwritten(
    bucketful: Bucketful, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bucketful.admin.put_object(
        bucketful.config.bucket, "shards/00.json", io.BytesIO(content), len(content)
    )
    bucketful.spill("chain", 20)
    report = bucketful.collect(capacity=10 * PAGE, use_period=1).report
    assert report.pages == 9
    assert "memkv bucket rebuild" in caplog.text
    taken = lease(bucketful)
    taken.acquire()
    assert taken.read()


def test_one_of_two_concurrent_nodes_gets_the_lease(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = lease(bucketful), lease(bucketful)
    read = Records.read

    def other_is_faster(self: Records, name: str, limit: int) -> object:
        record = read(self, name, limit)
        monkeypatch.setattr(Records, "read", read)
        two.acquire()
        return record

    monkeypatch.setattr(Records, "read", other_is_faster)
    with pytest.raises(LeaseHeldError, match="took over"):
        one.acquire()


def test_a_suspended_holder_notices_the_lost_lease_before_its_next_step(
    bucketful: Bucketful,
) -> None:
    silent, other = lease(bucketful, seconds=1), lease(bucketful, seconds=60)
    silent.acquire()
    give_up = time.monotonic() + LIMIT
    while other.read():
        assert time.monotonic() < give_up
        time.sleep(0.1)
    other.acquire()
    with pytest.raises(LeaseHeldError):
        silent.renew()
    other.renew()
    other.release()


def test_wrong_node_clock_has_no_effect(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = lease(bucketful), lease(bucketful)
    one.acquire()
    right = time.time
    # This is longer than a lease and shorter than the 15 minutes of skew that MinIO allows.
    monkeypatch.setattr(time, "time", lambda: right() + 600)
    assert two.read()
    with pytest.raises(LeaseHeldError):
        two.acquire()


def test_a_command_that_waits_for_another_node_says_so_and_gives_up(
    bucketful: Bucketful, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "NOTICE_SECONDS", 0.5)
    bucketful.spill("chain", 3)
    other = lease(bucketful)
    other.acquire()
    collector = bucketful.collector(capacity=PAGE)
    rebuilder = bucketful.tier.retention.rebuilder(limits())
    for operation in (collector.collect, rebuilder.run):
        shown = output.PhaseProgress(output.make_progress(), timeout=2)
        with pytest.raises(ClickException, match=f"waiting for .*:{os.getpid()}:.* a shard"):
            operation(shown.step)
        notices = capsys.readouterr().err.splitlines()
        assert len(notices) == 1
        assert notices[0].startswith("note: waiting for ")
    other.release()
    assert bucketful.collect(capacity=PAGE).report.pages == 0


def test_no_node_waits_for_a_removal_that_is_far_away(bucketful: Bucketful) -> None:
    bucketful.spill("chain", 3)
    odd = msgspec.json.encode(Round(number=7, phase="remove", remove_at=time.time() + 90_000))
    place = bucketful.config.bucket, ObjectNames("").round
    bucketful.admin.put_object(*place, io.BytesIO(odd), len(odd))
    assert bucketful.collect(capacity=PAGE).report.removed_pages == 3


def test_nodes_with_different_periods_remove_no_more_than_needed(bucketful: Bucketful) -> None:
    """`memkv gc` may join a round of agents that have another period."""
    chain = bucketful.spill("chain", 20)
    for periods in ((1, 3600), (3600, 1)):
        nodes = [
            bucketful.collector(capacity=10 * PAGE, max_age=86400, use_period=period)
            for period in periods
        ]
        nodes[0].look()
        assert nodes[0].begin()
        report = nodes[1].collect(lambda *_: None).report
        assert report.pages == 9
        assert prefix_length(bucketful.there(chain)) == 9
        bucketful.tier.clear(NAMESPACE.digest)
        chain = bucketful.spill(f"after {periods}", 20)


LEADER = """
import sys, time, msgspec
from memkv_sglang.config.schema import CollectorConfig, MinioConfig
from memkv_sglang.tiers.minio import MinioTier

tier = MinioTier(msgspec.json.decode(sys.argv[1], type=MinioConfig))
limits = CollectorConfig(capacity=1, use_period=1, lease_ttl=5, interval=1)
collector = tier.retention.collector(limits)

def step(what, done, total):
    if what == "removed" and done:
        print("in the middle", flush=True)
        time.sleep(600)

collector.collect(step)
"""


def test_another_node_finishes_after_the_collecting_node_is_killed(
    bucketful: Bucketful,
) -> None:
    chains = [bucketful.spill(f"chain {i}", 100) for i in range(2)]
    program = (
        f"import {collecting.__name__} as c, {shard_pass.__name__} as s\n"
        f"s.REMOVERS = c.REMOVED_AT_ONCE = 2\n{LEADER}"
    )
    settings = msgspec.json.encode(_plain(bucketful.config)).decode()
    with subprocess.Popen(
        [sys.executable, "-c", program, settings], stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "in the middle\n"
        os.kill(leader.pid, signal.SIGKILL)
    there = [sum(bucketful.there(chain)) for chain in chains]
    assert 0 < sum(there) < 200
    settings_here = limits(use_period=1, capacity=PAGE, lease_ttl=5)
    collector = bucketful.tier.retention.collector(settings_here)
    while collector.look().current.phase != "remove":
        raise AssertionError("the round of the killed node is over")
    began = time.monotonic()
    # Visits all shards except the one whose lease the dead node holds.
    collector.advance(lambda *_: None)
    held = [shard for shard in _shards(bucketful) if shard.read()]
    assert len(held) == 1
    assert time.monotonic() - began < LIMIT
    report = collector.collect(lambda *_: None).report
    assert report.pages <= 1
    assert collector.look().current.report == report


def _shards(bucketful: Bucketful) -> list[Shard]:
    bucket, records, names = bucketful.tier.access.control()
    return [Shard(records, bucket, names, number, 5) for number in range(4)]


_LIMITS = limits(use_period=1)


def _plain(config: MinioConfig) -> dict[str, object]:
    return msgspec.structs.asdict(config)


# Least privilege


def test_a_reader_loads_and_changes_nothing(
    bucketful: Bucketful, reader_config: MinioConfig
) -> None:
    chain = bucketful.spill("chain", 3)
    before = [bucketful.modified(key) for key in chain.keys()]
    tier = MinioTier(reader_config)
    try:
        assert tier.lookup(chain, deadline()) == Lookup(3, complete=True)
        pages = [make_page(key, [PAGE], filled=False) for key in chain.keys()]
        assert tier.load(pages, deadline()) == [LoadResult.LOADED] * 3
        assert tier.spill(pages, deadline()) == [SpillResult.REFUSED] * 3
        tier.describe(NAMESPACE)
        assert NAMESPACE.digest not in tier.namespaces()
        assert tier.clear(chain.namespace) == 0
        with pytest.raises(TierError, match="reader"):
            tier.remove(chain.keys())
        with pytest.raises(TierError, match="reader"):
            tier.retention.collector(_LIMITS)
    finally:
        tier.close()
    assert [bucketful.modified(key) for key in chain.keys()] == before


def test_a_reader_leaves_a_corrupt_page_where_it_is(
    bucketful: Bucketful, reader_config: MinioConfig
) -> None:
    chain = bucketful.spill("chain", 1)
    key = chain.keys()[0]
    name = ObjectNames("").page(key)
    metadata = bucketful.admin.stat_object(reader_config.bucket, name).metadata
    kept: dict[str, str | list[str] | tuple[str]] = {
        field: value
        for field, value in (metadata or {}).items()
        if field.lower().startswith("x-amz-meta-")
    }
    bucketful.admin.put_object(
        reader_config.bucket, name, io.BytesIO(b"w" * PAGE), PAGE, metadata=kept
    )
    tier = MinioTier(reader_config)
    try:
        for _ in range(2):
            page = make_page(key, [PAGE], filled=False)
            assert tier.load([page], deadline()) == [LoadResult.CORRUPT]
    finally:
        tier.close()
    assert bucketful.there(chain) == [True]
