"""Models with side pools: a hit ends where any pool's hit ends."""

from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from memkv_sglang.plugin.storage import MemKVStorage
from tests.plugin import host_pools
from tests.plugin.attached import after, keys, store
from tests.plugin.conftest import MakeNode

WINDOW = 3
ALL, TRAILING, BLOCKS = (
    PoolHitPolicy.ALL_PAGES,
    PoolHitPolicy.TRAILING_PAGES,
    PoolHitPolicy.BLOCK_GROUPS,
)
LENGTH = 12


@pytest.fixture
def chain() -> list[str]:
    return keys(LENGTH)


def hybrid() -> dict[str, Any]:
    return {
        "kv": host_pools.mha(),
        PoolName.SWA: host_pools.mha(),
        PoolName.MAMBA: host_pools.mamba(),
        PoolName.INDEXER: host_pools.mla(),
    }


def put(
    storage: MemKVStorage, pools: dict[str, Any], name: PoolName, chain: list[str], pages: range
) -> dict[int, bytes]:
    """Store some pages of the chain from the pool's pages with the same numbers."""
    pool = pools[name]
    contents = {page: host_pools.write(pool, page, hash((name, page)) % 2**31) for page in pages}
    policy = ALL if name == PoolName.INDEXER else TRAILING
    names = [chain[page] for page in pages]
    slots = host_pools.slots(pool, pages)
    transfer = PoolTransfer(name, host_indices=slots, keys=names, hit_policy=policy)
    done = storage.batch_set_v2([transfer], after(chain[: pages.start]))
    assert done == {name: [True] * len(pages)}
    return contents


def question(*names: PoolName) -> list[PoolTransfer]:
    """Return SGLang's query for a side pool: no indices yet, and one key per page of the window."""
    sizes = {PoolName.SWA: WINDOW, PoolName.MAMBA: 1}
    return [
        PoolTransfer(
            name,
            keys=[""] * sizes[name] if name in sizes else None,
            hit_policy=TRAILING if name in sizes else ALL,
        )
        for name in names
    ]


def test_only_lengths_that_every_pool_can_serve_are_hits(
    make_node: MakeNode, chain: list[str]
) -> None:
    near, far, pools = make_node("a"), make_node("b"), hybrid()
    storage = near.attach(pools)
    store(storage, pools["kv"], chain)
    put(storage, pools, PoolName.INDEXER, chain, range(11))
    for window in (range(2, 5), range(6, 9), range(7, 12)):
        put(storage, pools, PoolName.SWA, chain, window)
    for page in (4, 8, 9, 11):
        put(storage, pools, PoolName.MAMBA, chain, range(page, page + 1))
    near.upload()
    for asked in (storage, far.attach(hybrid())):
        swa = asked.batch_exists_v2(chain, question(PoolName.SWA))
        assert swa.restorable_prefix_pages == [5, 9, 10, 11, 12]
        hit = asked.batch_exists_v2(
            [*chain, *keys(2, "other")],
            question(PoolName.SWA, PoolName.MAMBA, PoolName.INDEXER),
        )
        assert hit.kv_hit_pages == 10
        assert hit.restorable_prefix_pages == [5, 9, 10]
        assert hit.extra_pool_hit_pages == {
            PoolName.KV: 12,
            PoolName.SWA: 12,
            PoolName.MAMBA: 12,
            PoolName.INDEXER: 11,
        }


def test_overlapping_windows_reach_the_other_node_complete(
    make_node: MakeNode, chain: list[str]
) -> None:
    """An earlier window becomes the end of a later one, as when SGLang splits a tree node."""
    near, far = make_node("a"), make_node("b")
    pools, others = hybrid(), hybrid()
    storage = near.attach(pools)
    put(storage, pools, PoolName.SWA, chain, range(6, 10))
    near.upload()
    contents = put(storage, pools, PoolName.SWA, chain, range(10))
    near.upload()
    pool, places = others[PoolName.SWA], [30 + page for page in contents]
    transfer = PoolTransfer(
        PoolName.SWA, host_indices=host_pools.slots(pool, places), keys=chain[:10]
    )
    loaded = far.attach(others).batch_get_v2([transfer], after([]))
    assert loaded == {PoolName.SWA: [True] * 10}
    assert [host_pools.read(pool, place) for place in places] == list(contents.values())


def test_a_missing_page_of_a_window_fails_it(make_node: MakeNode, chain: list[str]) -> None:
    pools = hybrid()
    storage = make_node().attach(pools)
    put(storage, pools, PoolName.SWA, chain, range(2))
    slots = host_pools.slots(pools[PoolName.SWA], range(20, 23))
    swa = PoolTransfer(PoolName.SWA, host_indices=slots, keys=chain[:3])
    unknown = PoolTransfer(PoolName.DRAFT, host_indices=slots, keys=chain[:3])
    empty = PoolTransfer(PoolName.MAMBA)
    loaded = storage.batch_get_v2([swa, unknown, empty], after([]))
    assert loaded["swa"] == [True, True, False]
    assert loaded["draft"] == [False] * 3
    assert loaded["mamba"] == []


def test_block_groups_report_their_coverage_and_limit_nothing(
    make_node: MakeNode, chain: list[str]
) -> None:
    pools = {"kv": host_pools.mha(), PoolName.DEEPSEEK_V4_C4: host_pools.compressed()}
    storage = make_node().attach(pools)
    store(storage, pools["kv"], chain)
    for page in (3, 7):
        put(storage, pools, PoolName.DEEPSEEK_V4_C4, chain, range(page, page + 1))
    blocks = PoolTransfer(PoolName.DEEPSEEK_V4_C4, hit_policy=BLOCKS, block_pages=4, group_pages=1)
    hit = storage.batch_exists_v2(chain, [blocks])
    assert hit.kv_hit_pages == LENGTH
    assert hit.extra_pool_hit_pages[PoolName.DEEPSEEK_V4_C4] == 8


def test_an_anchor_without_memory_stands_for_its_side_pools(
    make_node: MakeNode, chain: list[str]
) -> None:
    pools = {"kv": host_pools.logical(), PoolName.INDEXER: host_pools.compressed()}
    storage = make_node().attach(pools)
    slots = host_pools.slots(pools["kv"], range(LENGTH))
    assert storage.batch_set_v1(chain, slots, after([])) == [True] * LENGTH
    assert storage.batch_get_v1(chain, slots, after([])) == [True] * LENGTH
    put(storage, pools, PoolName.INDEXER, chain, range(7))
    hit = storage.batch_exists_v2(chain, question(PoolName.INDEXER))
    assert hit.kv_hit_pages == 7
    assert hit.extra_pool_hit_pages == {PoolName.KV: LENGTH, PoolName.INDEXER: 7}
    # Without a side pool to ask, nothing could be loaded.
    assert storage.batch_exists(chain) == 0


def test_ranks_share_only_equal_pages(make_node: MakeNode, chain: list[str]) -> None:
    """An MLA model: rank 0 writes the KV and all ranks read it, but each rank has its own
    states.
    """
    node = make_node()
    pools = [{"kv": host_pools.mla(), PoolName.MAMBA: host_pools.mamba()} for _ in range(2)]
    ranks = [
        node.attach(pools[rank], is_mla_model=True, tp_rank=rank, tp_size=2) for rank in range(2)
    ]
    store(ranks[0], pools[0]["kv"], chain)
    put(ranks[0], pools[0], PoolName.MAMBA, chain, range(4, 5))
    asked = question(PoolName.MAMBA)
    assert [rank.batch_exists(chain) for rank in ranks] == [LENGTH] * 2
    assert [rank.batch_exists_v2(chain, asked).kv_hit_pages for rank in ranks] == [5, 0]
    assert [ranks[1].differs_by_rank(name) for name in pools[1]] == [False, True]
