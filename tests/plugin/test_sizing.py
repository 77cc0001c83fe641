"""Host pools that are too small are reported; loads are charged for what they hold."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from memkv_sglang.log_limit import LogLimit
from memkv_sglang.plugin import sizing, state
from memkv_sglang.plugin.sizing import check_host_pool, rate_limited

LIMIT = 1000
PROMPT = 400


@pytest.mark.parametrize(
    ("host", "policy", "warned"),
    [
        (999, "write_through", True),
        (999, "write_through_selective", True),
        (1000, "write_through", False),
        (999, "write_back", False),
    ],
)
def test_a_host_pool_smaller_than_the_device_pool_is_reported(
    host: int, policy: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_host_pool(SimpleNamespace(size=host, device_capacity_tokens=1000), policy)
    assert ("holds 999 tokens, fewer than the device pool with 1000" in caplog.text) == warned
    assert ("--hicache-ratio" in caplog.text) == warned


class Tree:
    def __init__(self) -> None:
        self.ongoing_prefetch: dict[int, Any] = {}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> tuple[Tree, Any]:
    """A radix tree, and the part of SGLang's controller that counts loads."""
    tree = Tree()
    controller = HybridCacheController.__new__(HybridCacheController)
    controller.host_memory_mode = "cache"
    controller.storage_config = SimpleNamespace(pp_size=1)
    controller.prefetch_capacity_limit = LIMIT
    controller.prefetch_tokens_occupied = 0
    monkeypatch.setattr(state, "tree", weakref.ref(tree))
    monkeypatch.setattr(state, "storage", object())
    monkeypatch.setattr(sizing, "_limit", LogLimit(600))
    return tree, controller


def load(tree: Tree, controller: Any, found: int | None) -> None:
    """Begin a load. `found`: tokens that memory is allocated for; None while the lookup is
    pending.
    """
    held = None if found is None else range(found)
    tree.ongoing_prefetch[len(tree.ongoing_prefetch)] = SimpleNamespace(
        prefetch_key=range(PROMPT), host_indices=held
    )
    controller.prefetch_tokens_occupied += PROMPT


def limited(controller: Any) -> bool:
    return bool(rate_limited(HybridCacheController.prefetch_rate_limited, controller))


def test_loads_are_charged_for_what_was_found(server: tuple[Tree, Any]) -> None:
    tree, controller = server
    for _ in range(9):
        load(tree, controller, found=100)
    assert HybridCacheController.prefetch_rate_limited(controller)
    assert not limited(controller)
    load(tree, controller, found=100)
    assert limited(controller)


def test_unanswered_queries_count_in_full(server: tuple[Tree, Any]) -> None:
    tree, controller = server
    for _ in range(2):
        load(tree, controller, found=None)
    assert not limited(controller)
    load(tree, controller, found=None)
    assert limited(controller)


def test_the_limit_is_reported_once_with_its_numbers(
    server: tuple[Tree, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tree, controller = server
    for _ in range(3):
        load(tree, controller, found=PROMPT)
    assert limited(controller)
    assert limited(controller)
    assert caplog.text.count("hold 1200 of 1000 tokens") == 1
    assert "--hicache-size" in caplog.text


@pytest.mark.parametrize("change", ["stages", "buffers", "no storage"])
def test_sglangs_own_count_holds_where_the_tree_does_not_know(
    server: tuple[Tree, Any], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, controller = server
    for _ in range(3):
        load(tree, controller, found=0)
    if change == "stages":
        controller.storage_config.pp_size = 2
    elif change == "buffers":
        controller.host_memory_mode = "buffer_only"
        controller.mem_pool_host = SimpleNamespace(anchor_entry=SimpleNamespace(host_pool=None))
    else:
        monkeypatch.setattr(state, "storage", None)
    assert rate_limited(lambda controller: True, controller)
