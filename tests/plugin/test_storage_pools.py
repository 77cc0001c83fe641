"""Pages of SGLang's host pools are stored and loaded back byte for byte."""

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

from memkv_sglang.client.client import AgentClient
from memkv_sglang.page import Chain
from memkv_sglang.plugin import registered
from memkv_sglang.plugin.pools import Pool
from memkv_sglang.plugin.staging import Staging
from tests.plugin import host_pools
from tests.plugin.attached import after, keys, store
from tests.plugin.conftest import MakeNode

KINDS: dict[str, Callable[..., Any]] = {
    "mha": host_pools.mha,
    "mha page_first_direct": partial(host_pools.mha, "page_first_direct"),
    "mha layer_first": partial(host_pools.mha, "layer_first"),
    "asymmetric": host_pools.asymmetric,
    "mla": host_pools.mla,
}


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("mha", True), *((kind, False) for kind in KINDS)],
    ids=["mha staged", *KINDS],
)
def test_pages_come_back_on_another_node(make_node: MakeNode, kind: str, shared: bool) -> None:
    """One of them is shared memory, the other is not."""
    near, far = make_node("a"), make_node("b")
    pool, other = KINDS[kind](shared=shared), KINDS[kind](shared=not shared)
    chain = keys(20)
    contents = store(near.attach({"kv": pool}), pool, chain)
    near.upload()
    storage = far.attach({"kv": other})
    assert storage.batch_exists([*chain, *keys(4, "other")]) == 20
    places = list(range(40, 20, -1))
    assert storage.batch_get_v1(chain, host_pools.slots(other, places), after([])) == [True] * 20
    assert [host_pools.read(other, place) for place in places] == contents
    assert not any(host_pools.read(other, place)[0:64].strip(b"\0") for place in range(20))


def test_calls_larger_than_the_staging_memory(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = host_pools.mha(shared=False)
    size = 2 * 3 * pool.page_size * pool.size_per_token
    monkeypatch.setattr(registered, "Staging", lambda client: Staging(client, size))
    storage = make_node().attach({"kv": pool})
    assert _pool(storage).pages_per_call == 3
    chain = keys(20)
    contents = store(storage, pool, chain)
    places = range(30, 50)
    longer = [*chain, *keys(5, "other")]
    loaded = storage.batch_get_v1(longer, host_pools.slots(pool, range(30, 55)), after([]))
    assert loaded == [True] * 20 + [False] * 5
    assert [host_pools.read(pool, place) for place in places] == contents


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "staged"])
def test_every_call_names_all_preceding_pages(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Otherwise the agent cannot know which pages on its disk this chain continues."""
    pool = host_pools.mha(shared=shared)
    storage = make_node().attach({"kv": pool})
    _pool(storage).pages_per_call = 3
    calls: list[tuple[list[bytes], list[bytes]]] = []
    spill = AgentClient.spill

    def record(client: AgentClient, part: Chain, buffers: Any, before: Any = ()) -> Any:
        calls.append((list(part.hashes), list(before)))
        return spill(client, part, buffers, before)

    monkeypatch.setattr(AgentClient, "spill", record)
    chain = keys(13)
    for begin, end in ((0, 4), (4, 5), (5, 13)):
        slots = host_pools.slots(pool, range(begin, end))
        stored = storage.batch_set_v1(chain[begin:end], slots, after(chain[:begin]))
        assert stored == [True] * (end - begin)
    hashes = [bytes.fromhex(key) for key in chain]
    begins = [0, 3, 4, 5, 8, 11, 13]
    assert calls == [(hashes[i:j], hashes[:i]) for i, j in pairwise(begins)]


def test_a_missed_page_leaves_its_memory_unchanged(make_node: MakeNode) -> None:
    pool = host_pools.mha(shared=False)
    storage = make_node().attach({"kv": pool})
    store(storage, pool, keys(2))
    before = [host_pools.write(pool, place, 99) for place in range(10, 13)]
    asked = [*keys(1), *keys(2, "other")]
    loaded = storage.batch_get_v1(asked, host_pools.slots(pool, [10, 11, 12]), after([]))
    assert loaded == [True, False, False]
    assert [host_pools.read(pool, place) for place in (11, 12)] == before[1:]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "staged"])
@pytest.mark.parametrize("name", [PoolName.MAMBA, PoolName.DEEPSEEK_V4_C4])
def test_side_pools_round_trip(make_node: MakeNode, name: PoolName, shared: bool) -> None:
    make = host_pools.mamba if name == PoolName.MAMBA else host_pools.compressed
    pool, chain = make(shared=shared), keys(6)
    storage = make_node().attach({"kv": host_pools.mha(), name: pool})
    contents = [host_pools.write(pool, place, place) for place in range(6)]
    transfer = PoolTransfer(
        name, keys=chain, host_indices=host_pools.slots(pool, range(6)), hit_policy=_policy(name)
    )
    assert storage.batch_set_v2([transfer], after([])) == {name: [True] * 6}
    transfer.host_indices = host_pools.slots(pool, range(16, 10, -1))
    assert storage.batch_get_v2([transfer], after([])) == {name: [True] * 6}
    assert [host_pools.read(pool, place) for place in range(16, 10, -1)] == contents


def _policy(name: PoolName) -> PoolHitPolicy:
    sparse = name == PoolName.MAMBA
    return PoolHitPolicy.TRAILING_PAGES if sparse else PoolHitPolicy.ALL_PAGES


def test_a_pool_that_cannot_be_reached_turns_the_storage_off(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    pool, chain = host_pools.mha(), keys(4)
    with caplog.at_level(logging.ERROR):
        storage = make_node().attach({"kv": pool, "mamba": host_pools.mamba(side_state=True)})
        indices = host_pools.slots(pool, range(4))
        assert storage.batch_set_v1(chain, indices, after([])) == [False] * 4
        assert storage.batch_exists(chain) == 0
        assert storage.batch_get_v1(chain, indices, after([])) == [False] * 4
    (record,) = [r for r in caplog.records if "memkv: off" in r.getMessage()]
    assert "pool mamba: MambaPoolHost does not name the buffers of its pages" in record.getMessage()
    assert not record.exc_info


def test_pages_that_do_not_add_up_are_refused(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = host_pools.mha()
    named = pool.get_page_buffer_meta
    monkeypatch.setattr(pool, "get_page_buffer_meta", lambda i: [part[::2] for part in named(i)])
    storage = make_node().attach({"kv": pool})
    assert storage.batch_exists(keys(1)) == 0
    (record,) = [r for r in caplog.records if "memkv: off" in r.getMessage()]
    assert "names 8192 bytes per page, but has 1024 per token and 16 tokens" in record.getMessage()


def test_a_wrong_number_of_slots_is_a_miss(make_node: MakeNode) -> None:
    pool, chain = host_pools.mha(), keys(4)
    storage = make_node().attach({"kv": pool})
    short = host_pools.slots(pool, range(3))
    assert storage.batch_set_v1(chain, short, after([])) == [False] * 4
    assert store(storage, pool, chain)
    assert storage.batch_get_v1(chain, short, after([])) == [False] * 4
    assert storage.batch_exists(chain) == 4


def _pool(storage: Any) -> Pool:
    pool = storage._pools.get("kv").pool
    assert isinstance(pool, Pool)
    return pool
