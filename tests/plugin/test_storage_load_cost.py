"""Lookups hide pages from SGLang that it computes faster than they load."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from memkv_sglang.cli.scrape import parse_metrics
from memkv_sglang.plugin.storage import MemKVStorage
from tests.plugin import host_pools
from tests.plugin.attached import after, keys, store
from tests.plugin.conftest import MakeNode

CHAIN = keys(20)
TOKENS = len(CHAIN) * host_pools.PAGE


def computed(storage: MemKVStorage, seconds: float) -> None:
    """Pretend that the server computed prompts of the chain's length in that much time each."""
    for _ in range(2):
        batch = SimpleNamespace(
            launch_ts=time.monotonic() - seconds,
            forward_mode=SimpleNamespace(is_extend_without_speculative=lambda: True),
            prefix_lens=[0],
            extend_lens=[TOKENS],
        )
        storage._prefill._ended = 0.0
        storage.record_batch(batch)


def load(storage: MemKVStorage, pool: Any) -> None:
    slots = host_pools.slots(pool, range(40, 60))
    assert storage.batch_get_v1(CHAIN, slots, after([])) == [True] * 20


def test_pages_are_skipped_once_both_speeds_are_known(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memkv_sglang.plugin.prefill.MIN_TOKENS", 1)
    node, pool = make_node(), host_pools.mha()
    storage = node.attach({"kv": pool})
    store(storage, pool, CHAIN)
    computed(storage, 1e-7)
    assert storage.batch_exists(CHAIN) == 20, "nobody has loaded anything yet"
    load(storage, pool)
    assert storage.batch_exists(CHAIN) == 0
    assert storage.batch_exists_v2(CHAIN, []).kv_hit_pages == 0
    other = node.attach({"kv": host_pools.mha()})
    assert other.batch_exists(CHAIN) == 20, "a server that has computed nothing yet"


def test_the_agent_counts_what_loads_save_once_for_all_ranks(make_node: MakeNode) -> None:
    for tier, node in (("nvme", make_node("a")), ("minio", make_node("b"))):
        node.settings |= {"engine.prefill_speed": str(TOKENS / 2), "engine.promote": "never"}
        for rank in (0, 1):
            pool = host_pools.mha()
            storage = node.attach({"kv": pool}, tp_rank=rank, tp_size=2)
            if tier == "nvme":
                store(storage, pool, CHAIN)
                node.upload()
            load(storage, pool)
        with node.client() as client:
            samples = parse_metrics(client.metrics() or "", "the agent")
        assert samples.total("memkv_saved_prefill_tokens_total", tier=tier) == TOKENS
        assert samples.total("memkv_saved_prefill_seconds_total") == pytest.approx(2)


def test_a_configured_speed_overrides_the_measured_one(make_node: MakeNode) -> None:
    node, pool = make_node(), host_pools.mha()
    node.settings["engine.prefill_speed"] = "1e12"
    storage = node.attach({"kv": pool})
    store(storage, pool, CHAIN)
    load(storage, pool)
    computed(storage, 1000.0)
    assert storage.batch_exists(CHAIN) == 0
