"""The storage class is off in a forked child and works in a spawned process."""

import copy
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from memkv_sglang.plugin import state
from memkv_sglang.plugin.storage import MemKVStorage
from tests.agent.agent_harness import environment
from tests.plugin import host_pools
from tests.plugin.attached import Node, after, keys, prepare_process, store

CHAIN = keys(4)
LIMIT = 120.0


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    prepare_process(monkeypatch)
    made = Node(tmp_path, None)
    yield made
    made.close()


def in_child(work: Callable[[], object]) -> None:
    """Call a function in a forked child; fail if it raises or hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def use_everything(storage: MemKVStorage) -> None:
    indices = host_pools.slots(host_pools.mha(), range(4))
    assert state.storage is None
    assert storage.batch_exists(CHAIN) == 0
    assert not storage.exists(CHAIN[0])
    assert storage.batch_get_v1(CHAIN, indices, after([])) == [False] * 4
    assert storage.batch_set_v1(CHAIN, indices, after([])) == [False] * 4
    assert storage.batch_exists_v2(CHAIN).kv_hit_pages == 0
    assert storage.get_stats() is None
    storage.seal()
    assert storage.model is not None
    storage.unseal(storage.model)
    storage.clear()
    storage.close()


def test_forked_child_is_off_and_the_parent_continues(node: Node) -> None:
    pool = host_pools.mha()
    storage = node.attach({"kv": pool})
    store(storage, pool, CHAIN)
    locks = [storage._spill_lock, storage.traffic._lock]
    for lock in locks:  # another thread may hold them at the time of a fork
        lock.acquire()
    try:
        in_child(lambda: use_everything(storage))
    finally:
        for lock in locks:
            lock.release()
    assert state.storage is storage
    assert storage.batch_exists(CHAIN) == 4
    indices = host_pools.slots(pool, range(8, 12))
    assert storage.batch_get_v1(CHAIN, indices, after([])) == [True] * 4


def test_forks_amid_loads(node: Node) -> None:
    pool = host_pools.mha()
    storage = node.attach({"kv": pool})
    contents = store(storage, pool, CHAIN)
    indices = host_pools.slots(pool, range(8, 12))
    stop, wrong = threading.Event(), list[Any]()

    def load() -> None:
        while not stop.is_set():
            loaded = storage.batch_get_v1(CHAIN, indices, after([]))
            if not all(loaded):
                wrong.append(loaded)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(20):
            in_child(lambda: use_everything(storage))
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert [host_pools.read(pool, page) for page in range(8, 12)] == contents


def test_storage_is_neither_pickled_nor_copied(node: Node) -> None:
    storage = node.attach({"kv": host_pools.mha()})
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="make one in each process"):
            take(storage)


def find_by_own(home: Path, results: "multiprocessing.SimpleQueue[int]") -> None:
    patch = pytest.MonkeyPatch()
    prepare_process(patch)
    storage = Node(home, None).attach({"kv": host_pools.mha()})
    results.put(storage.batch_exists(CHAIN))
    storage.close()
    patch.undo()


def find_by(storage: MemKVStorage, results: "multiprocessing.SimpleQueue[int]") -> None:
    results.put(storage.batch_exists(CHAIN))


@pytest.mark.parametrize(
    "method",
    # A spawned process imports SGLang again.
    ["fork", pytest.param("spawn", marks=pytest.mark.slow)],
)
def test_multiprocessing(
    node: Node, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    pool = host_pools.mha()
    storage = node.attach({"kv": pool})
    store(storage, pool, CHAIN)
    context = multiprocessing.get_context(method)
    results: multiprocessing.SimpleQueue[int] = context.SimpleQueue()
    own = context.Process(target=find_by_own, args=(tmp_path, results))  # type: ignore[attr-defined]
    own.start()
    own.join(LIMIT)
    assert own.exitcode == 0 and results.get() == 4
    other = context.Process(target=find_by, args=(storage, results))  # type: ignore[attr-defined]
    if method == "fork":
        other.start()
        other.join(LIMIT)
        assert results.get() == 0
    else:
        with pytest.raises(TypeError, match="make one in each process"):
            other.start()
    assert storage.batch_exists(CHAIN) == 4
