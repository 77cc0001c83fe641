"""Host pages that a dead agent's requests may still write to are not returned to SGLang's pools."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

import torch
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from memkv_sglang.client.withheld import withheld
from memkv_sglang.plugin import hooks, state, storage_hooks, weights
from tests.plugin import host_pools
from tests.plugin.attached import Node, after, eventually, keys, prepare_process, store


class Request:
    """A lifetime that, to a client, looks as if a hung disk kept it alive."""

    def __init__(self) -> None:
        self._lock = os.memfd_create("lock", os.MFD_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        withheld.add(os.open(f"/proc/self/fd/{self._lock}", os.O_RDONLY))

    def land(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@pytest.fixture
def request_in_flight() -> Iterator[Request]:
    request = Request()
    yield request
    request.land()
    assert withheld.wait(10)


class Tree:
    """A stand-in for the radix tree; the plugin keeps a weak reference to it."""


class Controller:
    """The parts of SGLang's controller that `append_host_mem_release` uses."""

    _append_host_mem_release_pages = HybridCacheController._append_host_mem_release_pages

    def __init__(self) -> None:
        self.host_mem_release_queue: Queue[torch.Tensor] = Queue()
        self.mem_pool_host = SimpleNamespace(page_size=16, entry_map={})

    def release(self, indices: torch.Tensor) -> None:
        original = HybridCacheController.append_host_mem_release
        storage_hooks.release(original, self, host_indices=indices)


def test_release_waits_for_the_disk(request_in_flight: Request) -> None:
    controller = Controller()
    for first in (0, 32):
        controller.release(torch.arange(first, first + 32))
    assert controller.host_mem_release_queue.empty()
    request_in_flight.land()
    assert withheld.wait(10)
    pages = [controller.host_mem_release_queue.get_nowait().tolist()[0] for _ in range(4)]
    assert pages == [0, 16, 32, 48]
    controller.release(torch.arange(64, 80))
    assert controller.host_mem_release_queue.qsize() == 1


def test_reset_waits_for_the_disk(
    request_in_flight: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "enabled", True)
    resets: list[bool] = []
    reset = threading.Thread(
        target=weights.reset_tree,
        args=(lambda tree: resets.append(withheld.pending), Tree()),
    )
    reset.start()
    reset.join(0.2)
    assert not resets
    request_in_flight.land()
    reset.join(10)
    assert resets == [False]


def test_reset_gives_up_eventually(
    request_in_flight: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "enabled", True)
    monkeypatch.setattr(weights, "RESET_LIMIT", 0.1)
    with pytest.raises(RuntimeError, match=r"check the disk under nvme\.directory"):
        weights.reset_tree(lambda tree: pytest.fail("reset"), Tree())


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    prepare_process(monkeypatch)
    made = Node(tmp_path, None)
    yield made
    made.close()


def run(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


@pytest.mark.parametrize(("hooked", "stages"), [(True, 1), (False, 1), (True, 2)])
def test_load_returns_only_if_the_pages_can_be_withheld(
    node: Node,
    request_in_flight: Request,
    monkeypatch: pytest.MonkeyPatch,
    hooked: bool,
    stages: int,
) -> None:
    monkeypatch.setattr(hooks, "can_withhold", lambda: hooked)
    pool, chain = host_pools.mha(), keys(2)
    storage = node.attach({"kv": pool}, pp_size=stages)
    contents = store(storage, pool, chain)
    indices = host_pools.slots(pool, range(8, 10))
    thread, results = run(lambda: storage.batch_get_v1(chain, indices, after([])))
    if hooked and stages == 1:
        thread.join(20)
    else:
        thread.join(0.3)
        assert results == []
        request_in_flight.land()
        thread.join(20)
    assert results == [[True, True]]  # the agent still works, so it has loaded the pages
    assert [host_pools.read(pool, page) for page in (8, 9)] == contents


def test_staging_memory_is_not_used_meanwhile(
    node: Node, request_in_flight: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "can_withhold", lambda: True)
    pool, chain = host_pools.mha(shared=False), keys(2)
    storage = node.attach({"kv": pool})
    contents = store(storage, pool, chain)
    indices = host_pools.slots(pool, range(8, 10))
    assert storage.batch_get_v1(chain, indices, after([])) == [False, False]
    request_in_flight.land()
    eventually(lambda: not withheld.pending)
    assert storage.batch_get_v1(chain, indices, after([])) == [True, True]
    assert [host_pools.read(pool, page) for page in (8, 9)] == contents
