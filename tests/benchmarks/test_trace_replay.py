"""The replay makes the product's decisions, and the eviction order adapts to the workload."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.trace.cluster import SECOND_USE, WRITE_EVERYTHING, replay, round_robin
from benchmarks.trace.peers import ONLINE, Belady, Lru, hits_of_peer
from benchmarks.trace.product import NAMESPACE, ProductCache, ProductDisks
from benchmarks.trace.requests import Requests, Workload, mooncake
from benchmarks.trace.workloads import MAKERS, conversations, phases, popular_documents
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.planning.disk import page_hash
from memkv_sglang.testing.conformance import soon, spill
from tests.tiers.disks.disks_support import open_disks
from tests.tiers.nvme.nvme_support import capacity_for, disk, present


def test_trace_is_the_published_trace() -> None:
    trace = mooncake()
    assert (len(trace.requests), trace.pages, trace.ideal_hits) == (3993, 43924, 77953)


LONG = (conversations, phases)
"""Workloads that take long to replay with every peer."""


def hits_of_product(pages: int, requests: Requests) -> int:
    return sum(map(ProductCache(pages).request, requests))


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=[pytest.mark.slow] * (make in LONG)) for make in MAKERS],
    ids=lambda make: make.__name__,
)
def test_order_is_close_to_the_best_for_every_workload(make: Callable[[int], Workload]) -> None:
    """No single peer is close to the best on all of these: LRU reaches 0.5 of it on one, LRU-2 0.85
    on another.
    """
    workload = make(11)
    pages = workload.pages // 10
    best = max(hits_of_peer(kind, pages, workload.requests) for kind in ONLINE.values())
    assert hits_of_product(pages, workload.requests) >= 0.9 * best


def test_no_peer_beats_the_oracle() -> None:
    workload = popular_documents(3, reads=300)
    pages = workload.pages // 10
    belady = sum(map(Belady(pages, workload.requests).request, workload.requests))
    assert all(
        hits_of_peer(kind, pages, workload.requests) < belady < workload.ideal_hits
        for kind in ONLINE.values()
    )


@pytest.mark.parametrize("make", [conversations, popular_documents])
def test_tier_on_disk_decides_like_the_replay(
    make: Callable[[int], Workload], tmp_path: Path
) -> None:
    requests = make(5).requests[:150]
    pages = 160
    cache = ProductCache(pages)
    with disk(tmp_path / "nvme", capacity=capacity_for(pages)) as opened:
        for request in requests:
            hashes = [page_hash(page) for page in request]
            found = opened.tier.lookup(Chain(NAMESPACE, hashes), soon()).length
            assert found == cache.request(request)
            spill(opened.tier, [PageKey(NAMESPACE, page_hash) for page_hash in hashes])
        everything = sorted({page for request in requests for page in request})
        keys = [PageKey(NAMESPACE, page_hash(page)) for page in everything]
        assert present(opened.tier, keys) == [page in cache for page in everything]
        assert opened.tier.usage().evicted > pages


@pytest.mark.parametrize("make", [conversations, popular_documents])
def test_several_disks_hit_about_as_often_as_one(
    make: Callable[[int], Workload], tmp_path: Path
) -> None:
    """The disks work in parallel, so the replay of their decisions is not exact."""
    requests = make(5).requests[:150]
    replayed, one = ProductDisks(320, 2), ProductCache(320)
    hits = {"tier": 0, "replayed": 0, "one disk": 0}
    with open_disks(tmp_path, 2, capacity=capacity_for(160)) as opened:
        for request in requests:
            hashes = [page_hash(page) for page in request]
            hits["tier"] += opened.tier.lookup(Chain(NAMESPACE, hashes), soon()).length
            hits["replayed"] += replayed.request(request)
            hits["one disk"] += one.request(request)
            spill(opened.tier, [PageKey(NAMESPACE, page_hash) for page_hash in hashes])
        assert opened.tier.usage().evicted > 160
    assert hits["tier"] == pytest.approx(hits["replayed"], rel=0.05)
    assert hits["tier"] == pytest.approx(hits["one disk"], rel=0.05)


@settings(max_examples=15)
@given(seed=st.integers(0, 1 << 32), pages=st.integers(8, 60))
def test_leaves_are_evicted_before_their_roots(seed: int, pages: int) -> None:
    rng = random.Random(seed)
    trees = [_tree(rng, first=i << 16) for i in range(6)]
    cache = ProductCache(pages)
    for _ in range(60):
        request = list(rng.choice(rng.choice(trees)))[: rng.randint(1, 12)]
        cache.request(request[:pages])
        for chain in (chain for tree in trees for chain in tree):
            held = [page in cache for page in chain]
            assert held == sorted(held, reverse=True)


def _tree(rng: random.Random, first: int) -> list[list[int]]:
    """Return chains of 12 pages that share prefixes."""
    trunk = [first + i for i in range(12)]
    return [
        trunk[: (fork := rng.randint(1, 11))] + [first + 100 * branch + i for i in range(12 - fork)]
        for branch in range(1, 5)
    ]


def test_second_use_admission_costs_no_hits() -> None:
    workload = popular_documents(7, reads=800)
    placed, pages = round_robin(workload.requests), workload.pages // 10
    lru = replay(workload.requests, placed, pages, WRITE_EVERYTHING, ProductCache)
    ruled = replay(workload.requests, placed, pages, SECOND_USE, ProductCache)
    assert ruled.hits == lru.hits == workload.ideal_hits
    assert ruled.written <= 0.7 * lru.written
    assert ruled.nvme_hits >= 0.95 * lru.nvme_hits


def test_lru_evicts_the_least_recently_used_page() -> None:
    cache = Lru(2)
    assert [cache.request([page]) for page in (1, 2, 1, 3, 2, 3)] == [0, 0, 1, 0, 0, 1]
