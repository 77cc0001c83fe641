"""Nodes share a bucket: each finds the others' pages in few round trips."""

import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
import pytest
from memkv_testbed.s3_server import free_port
from memkv_testbed.tcp_proxy import TcpProxy
from minio import Minio
from minio.commonconfig import REPLACE, CopySource

from memkv_sglang.config.schema import MinioConfig
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import (
    holds_content,
    make_chain,
    make_hashes,
    make_namespace,
    make_page,
)
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import CHECKSUM, FORMAT, LENGTH, ObjectNames
from memkv_sglang.tiers.minio.presence_cache import PresenceCache

OpenTier = Callable[[MinioConfig], MinioTier]
LENGTHS = (1000, 24)
CHAIN = make_chain(make_namespace(page_bytes=sum(LENGTHS)), 200)


def soon() -> float:
    return time.monotonic() + 30


def spill(tier: MinioTier, keys: list[PageKey]) -> set[SpillResult]:
    return set(tier.spill([make_page(key, LENGTHS, filled=True) for key in keys], soon()))


def round_trips(tier: MinioTier) -> int:
    return tier.telemetry.counts().get("lookup_round_trips", 0)


def test_one_node_loads_what_another_spills(minio_config: MinioConfig, open_tier: OpenTier) -> None:
    one, other = open_tier(minio_config), open_tier(minio_config)
    assert spill(one, CHAIN.keys()) == {SpillResult.STORED}
    assert other.lookup(CHAIN, soon()) == (200, True)
    pages = [make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()]
    assert set(other.load(pages, soon())) == {LoadResult.LOADED}
    assert all(map(holds_content, pages))
    assert spill(other, CHAIN.keys()) == {SpillResult.PRESENT}


def test_invalidated_pages_are_looked_up_again(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    one, other = open_tier(minio_config), open_tier(minio_config)
    keys = CHAIN.keys()[:4]
    assert spill(one, keys) == {SpillResult.STORED}
    assert other.remove(keys[1:2]) == 1
    assert one.present(keys, soon()) == [True] * 4, "it remembers that it stored them"
    one.invalidate(keys)
    assert one.present(keys, soon()) == [True, False, True, True]
    assert one.spill([make_page(keys[1], LENGTHS, filled=True)], soon()) == [SpillResult.STORED]


def test_number_of_probes(minio_config: MinioConfig, open_tier: OpenTier) -> None:
    config = msgspec.structs.replace(minio_config, negative_ttl=60.0)
    one, other = open_tier(config), open_tier(config)
    assert other.lookup(CHAIN, soon()) == (0, True)
    assert round_trips(other) == 1
    assert other.lookup(CHAIN, soon()) == (0, True)
    assert round_trips(other) == 1, "a repeated miss asks again"

    assert spill(other, CHAIN.keys()[:150]) == {SpillResult.STORED}
    assert other.lookup(CHAIN, soon()) == (150, True)
    assert round_trips(other) == 2, "own spills are known, so only the next page is asked for"
    assert other.lookup(Chain(CHAIN.namespace, CHAIN.hashes[:150]), soon()) == (150, True)
    assert round_trips(other) == 2

    assert one.lookup(CHAIN, soon()) == (150, True)
    assert 2 <= round_trips(one) <= 5
    asked = round_trips(one)
    diverging = Chain(CHAIN.namespace, [*CHAIN.hashes[:99], *make_hashes(30, "other")])
    assert one.lookup(diverging, soon()) == (99, True)
    assert round_trips(one) == asked + 1, "what a lookup found below its answer is known"


def test_pages_of_other_nodes_are_found(minio_config: MinioConfig, open_tier: OpenTier) -> None:
    config = msgspec.structs.replace(minio_config, negative_ttl=0.05)
    one, other = open_tier(config), open_tier(config)
    assert other.lookup(CHAIN, soon()).length == 0
    spill(one, CHAIN.keys()[:3])
    give_up = soon()
    while other.lookup(CHAIN, soon()).length != 3:
        assert time.monotonic() < give_up


def test_pages_removed_by_others_are_invalidated(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    one, other = open_tier(minio_config), open_tier(minio_config)
    spill(one, CHAIN.keys()[:10])
    assert other.remove(CHAIN.keys()[6:10]) == 4
    pages = [make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()[:10]]
    results = one.load(pages, soon())
    assert results[:7] == [LoadResult.LOADED] * 6 + [LoadResult.MISSING]
    assert one.lookup(CHAIN, soon()) == (6, True)
    assert spill(one, CHAIN.keys()[6:10]) == {SpillResult.STORED}
    assert one.check_integrity() == []


def test_a_missing_page_invalidates_its_descendants(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    """The collector removes leaves first; stale entries would prevent uploads for minutes."""
    writer, reader = open_tier(minio_config), open_tier(minio_config)
    spill(writer, CHAIN.keys()[:10])
    reader.load([make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()[8:10]], soon())
    assert writer.remove(CHAIN.keys()[6:10]) == 4
    assert reader.lookup(CHAIN, soon()) == (6, True)
    assert spill(reader, CHAIN.keys()[6:10]) == {SpillResult.STORED}
    assert reader.check_integrity() == []


@pytest.mark.parametrize("field", [CHECKSUM, LENGTH, FORMAT])
def test_copy_with_wrong_metadata_is_quarantined(
    minio_config: MinioConfig,
    admin: Minio,
    open_tier: OpenTier,
    caplog: pytest.LogCaptureFixture,
    field: str,
) -> None:
    tier, key = open_tier(msgspec.structs.replace(minio_config, prefix="a/b c")), CHAIN.keys()[0]
    names = ObjectNames("a/b c")
    spill(tier, [key])
    bucket, name = minio_config.bucket, names.page(key)
    stored = admin.stat_object(bucket, name).metadata
    assert stored is not None
    metadata: dict[str, str | list[str] | tuple[str]] = {
        known: stored[known] for known in (CHECKSUM, LENGTH, FORMAT)
    }
    metadata[field] = "7" * len(stored[field])
    admin.copy_object(
        bucket, name, CopySource(bucket, name), metadata=metadata, metadata_directive=REPLACE
    )
    page = make_page(key, LENGTHS, filled=False)
    with caplog.at_level(logging.WARNING):
        assert tier.load([page], soon()) == [LoadResult.CORRUPT]
    assert [r.message for r in caplog.records].count("minio page corrupt") == 1
    assert tier.telemetry.counts()["corrupt"] == 1
    assert admin.stat_object(bucket, names.quarantine(key)).size == sum(LENGTHS)
    assert tier.load([page], soon()) == [LoadResult.MISSING]
    assert spill(tier, [key]) == {SpillResult.STORED}
    assert tier.load([page], soon()) == [LoadResult.LOADED]
    assert holds_content(page)


def test_prefixes_are_separate(minio_config: MinioConfig, open_tier: OpenTier) -> None:
    one = open_tier(msgspec.structs.replace(minio_config, prefix="one"))
    other = open_tier(msgspec.structs.replace(minio_config, prefix="one/more"))
    spill(one, CHAIN.keys()[:3])
    one.describe(make_namespace())
    assert other.lookup(CHAIN, soon()).length == 0
    assert other.namespaces() == {}
    assert other.clear(CHAIN.namespace) == 0
    assert one.lookup(CHAIN, soon()).length == 3


def test_every_description_call_rewrites_the_object(
    minio_config: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    """The bucket's lifecycle rule may have removed it."""
    tier, namespace = open_tier(minio_config), make_namespace()
    names = ObjectNames(minio_config.prefix)
    for _ in range(2):
        tier.describe(namespace)
        assert tier.namespaces() == {namespace.digest: namespace}
        admin.remove_object(minio_config.bucket, names.description(namespace.digest))
        assert tier.namespaces() == {}


def test_endpoints_are_used_evenly_and_dead_ones_skipped(
    minio_config: MinioConfig, open_tier: OpenTier
) -> None:
    parts = urlsplit(minio_config.endpoint)
    assert parts.hostname
    assert parts.port
    with TcpProxy(parts.hostname, parts.port) as a, TcpProxy(parts.hostname, parts.port) as b:
        dead = f"http://127.0.0.1:{free_port()}"
        config = msgspec.structs.replace(
            minio_config, endpoint=f"{dead},{a.url},{b.url}", connections=8
        )
        tier = open_tier(config)
        assert spill(tier, CHAIN.keys()) == {SpillResult.STORED}
        pages = [make_page(key, LENGTHS, filled=False) for key in CHAIN.keys()]
        assert set(tier.load(pages, soon())) == {LoadResult.LOADED}
        assert tier.lookup(CHAIN, soon()).length == 200
        assert min(a.accepted, b.accepted) >= 2
        b.close()
        assert set(tier.load(pages, soon())) <= {LoadResult.LOADED}
        tier.close()


def test_deleted_bucket_is_recreated(
    minio_config: MinioConfig, admin: Minio, open_tier: OpenTier
) -> None:
    tier = open_tier(minio_config)
    tier.check(soon())
    admin.remove_object(minio_config.bucket, "memkv.json")
    admin.remove_bucket(minio_config.bucket)
    key = CHAIN.keys()[:1]
    give_up = soon()
    while spill(tier, key) != {SpillResult.STORED}:
        assert time.monotonic() < give_up


def test_cached_pages_expire() -> None:
    cache, keys = PresenceCache(limit=1000, negative_ttl=60.0, turn=0.1), CHAIN.keys()
    cache.add(keys)
    assert cache.bounds(CHAIN) == (len(keys), len(keys))
    give_up = time.monotonic() + 10
    # Reading an entry does not extend its lifetime.
    while cache.has(keys[:1]) == [True] or cache.bounds(CHAIN)[0]:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    assert cache.check_integrity() == []


def test_presence_cache_is_bounded() -> None:
    cache = PresenceCache(limit=100, negative_ttl=60.0)
    for key in CHAIN.keys():
        cache.add([key])
        assert cache.check_integrity() == []
    known = sum(cache.has(CHAIN.keys()))
    assert 50 <= known <= 100
    assert cache.has(CHAIN.keys()[-1:]) == [True]


def test_adding_a_chain_equals_adding_its_pages() -> None:
    together, apart = (PresenceCache(limit=100, negative_ttl=60.0) for _ in range(2))
    namespace = make_namespace()
    chains = [make_chain(namespace, length, f"{length}") for length in (30, 20, 120, 40)]
    keys = [key for chain in chains for key in chain.keys()]
    for chain in [*chains, *chains[:2]]:
        together.add_missing(chain.keys()[-1])
        together.add_chain(chain)
        assert together.check_integrity() == []
        for key in chain.keys():
            apart.add([key])
        assert together.has(keys) == apart.has(keys)
