"""The storage object never raises, never waits longer than necessary, and releases everything."""

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.mem_cache.hicache_storage import PoolTransfer

import memkv_sglang
from memkv_sglang.cli.request_times import read_requests
from memkv_sglang.client.client import AgentClient
from memkv_sglang.page import Chain
from memkv_sglang.plugin import attachment, state
from memkv_sglang.plugin import storage as storage_module
from memkv_sglang.plugin.fingerprint import NoFingerprintError
from memkv_sglang.plugin.storage import MemKVStorage
from memkv_sglang.tiers.base import Lookup
from tests.plugin import host_pools
from tests.plugin.attached import MODEL, after, eventually, keys, storage_config, store
from tests.plugin.conftest import MakeNode

pytestmark = pytest.mark.usefixtures("process")


def test_sglang_finds_the_storage_class() -> None:
    assert memkv_sglang.MemKVStorage is MemKVStorage
    with pytest.raises(AttributeError):
        memkv_sglang.NoSuchClass  # noqa: B018


def assert_is_off(storage: MemKVStorage) -> None:
    pool = host_pools.mha()
    storage.register_mem_pool_host(pool)
    storage.register_mem_host_pool_v2(pool, "kv")
    indices = host_pools.slots(pool, range(2))
    transfers = [PoolTransfer("kv", host_indices=indices, keys=keys(2))]
    assert storage.batch_exists(keys(2)) == 0
    assert storage.batch_exists_v2(keys(2), transfers).kv_hit_pages == 0
    assert storage.batch_get_v1(keys(2), indices) == [False, False]
    assert storage.batch_set_v1(keys(2), indices) == [False, False]
    assert storage.batch_get_v2(transfers) == {"kv": [False, False]}
    assert storage.batch_set_v2(transfers) == {"kv": [False, False]}
    assert storage.get_stats() is None
    storage.seal()
    storage.unseal(MODEL)
    storage.clear()
    storage.close()
    assert state.storage is None
    assert state.enabled


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"settings": {"nvme.capacity": "two"}}, "--nvme-capacity: 'two' is not a size"),
        ({"settings": {"no.such": "1"}}, "no.such"),
        ({"file": "/nowhere/memkv.toml"}, "/nowhere/memkv.toml"),
    ],
)
def test_bad_settings_turn_it_off_with_one_line(
    entry: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert_is_off(MemKVStorage(storage_config({"memkv": entry})))
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "memkv: off" in record.getMessage()
    assert reason in record.getMessage()
    assert not record.exc_info


def test_a_model_without_a_name_turns_it_off(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(server_args: Any, salt: str) -> None:
        raise NoFingerprintError("dummy weights have no identity")

    monkeypatch.setattr(storage_module, "identify_model", refuse)
    assert_is_off(make_node().attach({"kv": host_pools.mha()}))
    assert "dummy weights have no identity" in caplog.text


def test_page_hashes_are_compiled_before_the_first_lookup(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If SGLang's lookup thread were compiling during a flush, the server would end."""

    def compile_nothing() -> None:
        raise RuntimeError("no compiler")

    module = "sglang.srt.mem_cache.cpp_utils.native_hash"
    monkeypatch.setattr(f"{module}._load_native_hash_module", compile_nothing)
    pool = host_pools.mha()
    storage = make_node().attach({"kv": pool})
    assert "cannot compile its page hashes (no compiler), so Python computes them" in caplog.text
    store(storage, pool, keys(2))
    assert storage.batch_exists(keys(2)) == 2


def test_startup_does_not_wait_for_an_agent_that_cannot_start(
    make_node: MakeNode, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachment, "AGENT_SECONDS", 60.0)
    node = make_node()
    node.settings["nvme.directory"] = "/proc/pages"
    begin = time.monotonic()
    storage = node.attach({"kv": host_pools.mha()})
    assert time.monotonic() - begin < 20.0
    assert state.storage is storage
    assert storage.batch_exists(keys(1)) == 0


def test_environment_settings_suffice(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to SGLang's attach endpoint need not name any settings."""
    node, pool = make_node(), host_pools.mha()
    for key, value in node.settings.items():
        monkeypatch.setenv("MEMKV_" + key.upper().replace(".", "_"), value)
    store(node.attach({"kv": pool}), pool, keys(3))
    storage = MemKVStorage(storage_config({"backend_name": "memkv"}))
    try:
        storage.register_mem_pool_host(host_pools.mha())
        assert storage.batch_exists(keys(3)) == 3
    finally:
        storage.close()


@pytest.mark.parametrize(("budget", "seconds"), [("50ms", 1.0), ("3s", 3.0)])
def test_the_time_limit_of_lookups_can_be_raised(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, budget: str, seconds: float
) -> None:
    asked: list[float] = []

    def look_up(client: AgentClient, chain: Chain, limit: float, *_: Any, **more: Any) -> Lookup:
        asked.append(limit)
        return Lookup(0, complete=True)

    monkeypatch.setattr(AgentClient, "lookup", look_up)
    node = make_node(minio=None)
    node.settings["engine.lookup_budget"] = budget
    storage = node.attach({"kv": host_pools.mha()})
    storage.batch_exists(keys(2))
    storage.batch_exists_v2(keys(2), [])
    first, second = asked
    assert first == seconds >= second > seconds / 2


def test_a_detached_storage_leaves_no_pool_behind(make_node: MakeNode) -> None:
    node, chain = make_node(), keys(4)
    for shared in (True, False, True):
        pools = {"kv": host_pools.mha(shared=shared), "mamba": host_pools.mamba(shared=shared)}
        storage = node.attach(pools)
        assert state.storage is storage
        store(storage, pools["kv"], chain)
        assert node.pools() == (4 if shared else 1)
        storage.close()
        storage.close()
        assert state.storage is None
        eventually(lambda: node.pools() == 0)
        assert storage.batch_exists(chain) == 0
    assert "memkv-staging" not in Path("/proc/self/maps").read_text()


def test_a_killed_agent_costs_misses_only(make_node: MakeNode) -> None:
    node, pool, chain = make_node(), host_pools.mha(), keys(8)
    storage = node.attach({"kv": pool})
    contents = store(storage, pool, chain)
    indices = host_pools.slots(pool, range(20, 28))
    with node.client() as client:
        report = client.status()
    assert report is not None
    os.kill(report.agent.pid, signal.SIGKILL)
    loaded = storage.batch_get_v1(chain, indices, after([]))
    assert all(host_pools.read(pool, 20 + i) == contents[i] for i, ok in enumerate(loaded) if ok)
    eventually(lambda: storage.batch_exists(chain) == 8)
    assert storage.batch_get_v1(chain, indices, after([])) == [True] * 8


def test_pages_refused_while_the_agent_restarts_are_stored(make_node: MakeNode) -> None:
    """SGLang drops a page for good if the storage refuses it."""
    pool, node = host_pools.mha(), make_node()
    storage = node.attach({"kv": pool})
    store(storage, pool, keys(4))
    with node.client() as client:
        report = client.status()
    assert report is not None
    os.kill(report.agent.pid, signal.SIGKILL)
    store(storage, pool, keys(4, "next"))
    assert storage.batch_exists(keys(4, "next")) == 4


def test_a_sealed_storage_neither_finds_nor_stores(make_node: MakeNode) -> None:
    pool, chain = host_pools.mha(), keys(4)
    indices = host_pools.slots(pool, range(4))
    storage = make_node().attach({"kv": pool})
    store(storage, pool, chain)
    storage.seal()
    assert storage.batch_exists(chain) == 0
    assert storage.batch_get_v1(chain, indices, after([])) == [False] * 4
    assert storage.batch_set_v1(chain, indices, after([])) == [False] * 4
    storage.unseal(MODEL._replace(revision="new"))
    assert storage.batch_exists(chain) == 0
    assert storage.batch_set_v1(chain, indices, after([])) == [True] * 4
    storage.unseal(MODEL)
    assert storage.batch_exists(chain) == 4


def test_statistics_are_reported_once(make_node: MakeNode) -> None:
    pool, chain = host_pools.mha(), keys(12)
    storage = make_node().attach({"kv": pool})
    store(storage, pool, chain[:8])
    storage.batch_get_v1(chain[:8], host_pools.slots(pool, range(20, 28)), after([]))
    storage.batch_get_v1(chain[8:], host_pools.slots(pool, range(28, 32)), after([]))
    stats = storage.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([8], [8])
    (load,), (spill,) = stats.prefetch_bandwidth, stats.backup_bandwidth
    size = 8 * pool.page_size * pool.size_per_token / 2**30
    assert all(size / 10 < rate < size / 1e-6 for rate in (load, spill))
    assert storage.get_stats() is None


def test_statistics_lose_nothing_between_threads(make_node: MakeNode) -> None:
    pool = host_pools.mha()
    storage = make_node().attach({"kv": pool})
    store(storage, pool, keys(1))
    storage.get_stats()
    slot = host_pools.slots(pool, range(1))

    def load() -> None:
        for _ in range(50):
            storage.batch_get_v1(keys(1), slot, after([]))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen = 0
    while seen < 150 and any(thread.is_alive() for thread in threads):
        seen += len(getattr(storage.get_stats(), "prefetch_pgs", ()))
    for thread in threads:
        thread.join()
    seen += len(getattr(storage.get_stats(), "prefetch_pgs", ()))
    assert seen == 150


def test_a_request_knows_which_tier_its_pages_came_from(
    make_node: MakeNode, caplog: pytest.LogCaptureFixture
) -> None:
    pool, chain = host_pools.mha(), keys(6)
    near, far = make_node("a"), make_node("b")
    far.settings["agent.log_requests"] = "all"
    store(near.attach({"kv": pool}), pool, chain)
    near.upload()
    other = host_pools.mha()
    storage = far.attach({"kv": other})
    slots = host_pools.slots(other, range(6))
    assert storage.batch_set_v1(chain[:2], slots[: 2 * host_pools.PAGE], after([])) == [True] * 2
    with caplog.at_level(logging.DEBUG), storage.traffic.load_of("r1", host_pools.PAGE):
        assert all(storage.batch_get_v1(chain, slots, after([])))
    assert "loaded tokens: {'nvme': 32, 'minio': 64}" in caplog.text
    log = Path(far.settings["agent.socket"]).with_name("agent.log")
    (times,) = read_requests(log.read_bytes().splitlines(), request="r1")
    assert (times.client, times.operations["load"].done) == (os.getpid(), 6)
    assert {name: step.done for name, step in times.steps["load"].items()} == {
        "nvme": 2,
        "minio": 4,
    }
