"""Hybrid models, driven through SGLang's radix tree, cache controller and host pools.

Nothing runs the model: its kernels need a GPU. All else is SGLang's, and the content of the pages
and states is known.
"""

import dataclasses
import functools
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "sglang.test.kits.unified_radix_cache", reason="needs the fixtures of SGLang 0.5.23's own tests"
)

from sglang.srt import runtime_context
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang_cpu_platform import host_pools, pinning

from memkv_sglang.agent import protocol
from memkv_sglang.cli.request_times import read_requests
from memkv_sglang.plugin import device_pools, hooks
from tests.plugin.conftest import MakeNode
from tests.plugin.hybrid_trees import hybrid_tree

FULL, MAMBA = ComponentType.FULL, ComponentType.MAMBA
CONFIGS = {
    "no_buffer": CacheConfig(page_size=1, components=(FULL, MAMBA)),
    "extra_buffer": CacheConfig(
        page_size=16, components=(FULL, MAMBA), enable_mamba_extra_buffer=True, mamba_cache_size=60
    ),
}
"""SGLang's two strategies: one state per sequence, with pages of one token; or states at the ends
of pages."""

STATES = (3, 6, 10)
"""Numbers of pages after which the sequence has a state."""


POOLS = (
    (MHATokenToKVPoolHost, host_pools.mha_load_layer, host_pools.mha_back_up_layers),
    (MambaPoolHost, host_pools.mamba_load_layer, host_pools.mamba_back_up_layers),
)

SERVER_ARGS = runtime_context.get_server_args
ATTACH = HiCacheController.attach_storage_backend


@pytest.fixture(params=CONFIGS)
def config(
    request: pytest.FixtureRequest, process: None, monkeypatch: pytest.MonkeyPatch
) -> CacheConfig:
    monkeypatch.setattr(runtime_context, "get_server_args", SERVER_ARGS)
    monkeypatch.setattr(HiCacheController, "attach_storage_backend", _attach)
    for pool, load, back_up in POOLS:
        monkeypatch.setattr(pool, "load_to_device_per_layer", load)
        monkeypatch.setattr(pool, "backup_from_device_all_layer", back_up)
        monkeypatch.setattr(pool, "__init__", _unpinned(pool.__init__))
    return CONFIGS[request.param]


def _attach(controller: Any, *args: Any, **kwargs: Any) -> Any:
    return device_pools.attach(ATTACH, controller, *args, **kwargs)


def _unpinned(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)  # the compatibility check at startup reads the wrapped function's source
    def init(pool: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = pinning.not_pinned(*args, **kwargs)
        make(pool, *args, **kwargs)

    return init


def sequence(pages: int, config: CacheConfig, first: int = 7) -> list[int]:
    return [first + 3 * i for i in range(pages * config.page_size)]


def test_a_prefix_ends_at_a_state(make_node: MakeNode, config: CacheConfig) -> None:
    near, far, tokens = make_node("a"), make_node("b"), sequence(STATES[-1], config)
    with hybrid_tree(config, near.settings) as tree:
        for pages in STATES:
            tree.compute(tokens[: pages * config.page_size])
        tree.store()
    near.upload()
    other = sequence(2, config, first=5001)
    for node in (near, far):
        for pages, found in ((10, 10), (9, 6), (6, 6), (5, 3), (3, 3), (2, 0)):
            with hybrid_tree(config, node.settings) as tree:
                asked = [*tokens[: pages * config.page_size], *other]
                assert tree.load(asked) == found * config.page_size


def test_a_restarted_node_loads_from_its_disk(make_node: MakeNode, config: CacheConfig) -> None:
    node, tokens = make_node(minio=None), sequence(8, config)
    with hybrid_tree(config, node.settings) as tree:
        tree.compute(tokens)
        tree.store()
    node.close()
    changed = [tokens[0] + 1, *tokens[1:]]
    with hybrid_tree(config, node.settings) as tree:
        assert tree.load(changed) == 0
        assert tree.load(tokens) == len(tokens)


@pytest.mark.parametrize("config", ["no_buffer"], indirect=True)
def test_a_chain_of_more_pages_than_fit_a_message(
    make_node: MakeNode, config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang looks up all pages of a hybrid model in one call, here pages of one token."""
    monkeypatch.setattr(protocol, "MAX_HASHES", 400)
    node, tokens = make_node(minio=None), sequence(1000, config)
    large = dataclasses.replace(config, kv_size=2000, max_context_len=2000)
    with hybrid_tree(large, node.settings) as tree:
        tree.compute(tokens)
        tree.store()
    with hybrid_tree(large, node.settings) as tree:
        assert tree.load(tokens) == len(tokens)


def test_the_agents_log_names_the_request_that_lookups_and_loads_are_for(
    make_node: MakeNode, config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hook in hooks.optional_hooks():
        if hook.name in ("storage_hooks.look_up", "storage_hooks.load"):
            _install(hook, monkeypatch)
    node, tokens = make_node(minio=None), sequence(8, config)
    node.settings |= {"agent.log_requests": "all", "agent.log_format": "json"}
    with hybrid_tree(config, node.settings) as tree:
        tree.compute(tokens)
        tree.store()
    with hybrid_tree(config, node.settings) as tree:
        assert tree.load(tokens) == len(tokens)
    log = Path(node.settings["agent.socket"]).with_name("agent.log")
    (times,) = read_requests(log.read_bytes().splitlines(), request="request 1")
    found = {name: operation.done for name, operation in times.operations.items()}
    assert found["lookup"] == 8  # KV pages
    assert found["check"] > 0  # states
    assert found["load"] > 8  # KV pages and states
    assert times.steps["load"].keys() == {"nvme"}


def _install(hook: hooks.Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrap a method as SGLang's hook registry does."""
    owner, _, name = hook.target.rpartition(".")
    original = pkgutil.resolve_name(hook.target)

    @functools.wraps(original)
    def wrapped(*args: Any) -> Any:
        return hook.wrapper(original, *args)

    monkeypatch.setattr(pkgutil.resolve_name(owner), name, wrapped)


@pytest.mark.parametrize("lost", ["kv", "mamba"])
def test_a_pool_that_has_lost_its_pages_makes_a_miss(
    make_node: MakeNode, config: CacheConfig, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    node, tokens = make_node(minio=None), sequence(8, config)
    with caplog.at_level("INFO"), hybrid_tree(config, node.settings) as tree:
        tree.compute(tokens)
        tree.store()
    (digest,) = set(re.findall(rf"pool {lost} in namespace (\w+)", caplog.text))
    with node.client() as client:
        assert client.clear(bytes.fromhex(digest))
    with hybrid_tree(config, node.settings) as tree:
        assert tree.load(tokens) == 0
        tree.compute(tokens)
        tree.store()
    with hybrid_tree(config, node.settings) as tree:
        assert tree.load(tokens) == len(tokens)
