"""A client belongs to the process that created it: no other process or thread shares its
connection.
"""

import copy
import ctypes
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.connection import AgentConnection, ConnectionLostError
from memkv_sglang.client.withheld import withheld
from memkv_sglang.config.schema import Config
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult
from tests.agent.agent_harness import (
    LIMIT,
    NAMESPACE,
    HostPool,
    RunningAgent,
    connected_client,
    environment,
    eventually,
    make_config,
    running_agent,
)

PAGES = 16
STORED = make_chain(NAMESPACE, PAGES, "stored")
MISSING = make_chain(NAMESPACE, PAGES, "missing")
MISSES = [PageLoad(LoadResult.FAILED)] * PAGES


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


@pytest.fixture
def agent(config: Config) -> Iterator[RunningAgent]:
    with running_agent(config) as running:
        yield running


@pytest.fixture
def client(config: Config, agent: RunningAgent) -> Iterator[AgentClient]:
    with connected_client(config) as connected:
        yield connected


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(3 * PAGES) as memory:
        yield memory


def in_child(work: Callable[[], object]) -> int:
    """Call a function in a forked child, which then exits; return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(20)
        work()
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def assert_succeeded(pid: int) -> None:
    assert os.waitpid(pid, 0)[1] == 0


def fill(client: AgentClient, pool: HostPool) -> int:
    number = client.register_pool(pool.descriptor, pool.length)
    pool.fill(STORED)
    stored = client.spill(STORED, pool.buffers(number, range(PAGES)))
    assert set(stored) <= {SpillResult.STORED, SpillResult.PRESENT}
    pool.wipe()
    return number


def test_replies_do_not_swap_between_parent_and_child(client: AgentClient, pool: HostPool) -> None:
    number = fill(client, pool)

    def load_in_child() -> None:
        buffers = pool.buffers(number, range(2 * PAGES, 3 * PAGES))
        for _ in range(300):
            assert client.load(STORED, buffers) == MISSES

    child = in_child(load_in_child)
    for _ in range(300):
        loads = client.load(MISSING, pool.buffers(number, range(PAGES)))
        assert [load.result for load in loads if load.result is LoadResult.LOADED] == []
    assert_succeeded(child)
    loads = client.load(STORED, pool.buffers(number, range(PAGES)))
    assert {load.result for load in loads} == {LoadResult.LOADED}
    assert pool.holds(STORED)
    assert not any(pool.memory[2 * PAGES * 4096 : 3 * PAGES * 4096])


def use_everything(client: AgentClient) -> None:
    """Call every method of a client: it finds nothing, does not hang, and does not raise."""
    with HostPool(PAGES) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        buffers = pool.buffers(number, range(PAGES))
        assert "parent" in client.problem
        assert not client.wait(LIMIT)
        assert client.describe(NAMESPACE) == NAMESPACE.digest
        assert client.lookup(STORED) == Lookup(0, complete=False)
        assert client.present(STORED) == [False] * PAGES
        assert client.load(STORED, buffers) == MISSES
        assert client.spill(STORED, buffers) == [SpillResult.REFUSED] * PAGES
        assert client.warm(STORED, 1.0) is None
        assert client.clear(NAMESPACE.digest) == 0
        assert not client.empty(NAMESPACE.digest, 1.0)
        assert not client.flush(1.0)
        assert client.status() is None
        assert not client.shutdown()
        assert not client.withholding
        called: list[bool] = []
        client.when_free(lambda: called.append(True))
        assert called
        client.release_pool(number)
        client.close()
        client.close()


def test_child_finds_nothing_and_the_parent_is_unaffected(
    client: AgentClient, pool: HostPool
) -> None:
    number = fill(client, pool)
    assert_succeeded(in_child(lambda: use_everything(client)))
    report = client.status()
    assert report is not None and report.agent.pools == 1
    loads = client.load(STORED, pool.buffers(number, range(PAGES)))
    assert {load.result for load in loads} == {LoadResult.LOADED}


def test_locks_held_during_the_fork_do_not_block_the_child(client: AgentClient) -> None:
    reconnector = client._reconnector
    event: Any = reconnector._connected
    locks = [reconnector._lock, reconnector.registry.lock, withheld._changed, event._cond]
    release = threading.Event()
    held = threading.Barrier(len(locks) + 1)

    def hold(lock: Any) -> None:
        with lock:
            held.wait()
            release.wait()

    threads = [threading.Thread(target=hold, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    held.wait()
    try:
        child = in_child(lambda: use_everything(client))
    finally:
        release.set()
        for thread in threads:
            thread.join()
    assert_succeeded(child)


@pytest.mark.parametrize("forks", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_forks_amid_calls(client: AgentClient, pool: HostPool, forks: int) -> None:
    number = fill(client, pool)
    stop = threading.Event()
    wrong: list[object] = []

    def call(chain: Chain, expected: set[LoadResult], first: int) -> None:
        buffers = pool.buffers(number, range(first, first + PAGES))
        while not stop.is_set():
            results = {load.result for load in client.load(chain, buffers)}
            if results != expected:
                wrong.append(results)

    missed = {LoadResult.MISSING, LoadResult.SKIPPED}
    calls = ((STORED, {LoadResult.LOADED}, 0), (MISSING, missed, PAGES))
    threads = [threading.Thread(target=call, args=args) for args in calls]
    for thread in threads:
        thread.start()
    try:
        for _ in range(forks):
            assert_succeeded(in_child(lambda: use_everything(client)))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_child_creates_its_own_client(config: Config, client: AgentClient, pool: HostPool) -> None:
    fill(client, pool)

    def load_by_own() -> None:
        with connected_client(config) as own:
            number = own.register_pool(pool.descriptor, pool.length)
            loads = own.load(STORED, pool.buffers(number, range(PAGES)))
            assert {load.result for load in loads} == {LoadResult.LOADED}

    assert_succeeded(in_child(load_by_own))
    assert pool.holds(STORED)
    assert client.lookup(STORED).length == PAGES


def descriptors() -> set[str]:
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.add(str(link.readlink()))
        except FileNotFoundError:  # the descriptor of the listing itself is closed by now
            continue
    return {name for name in names if name.startswith(("socket:", "anon_inode:", "/memfd:"))}


def test_child_keeps_none_of_the_descriptors(config: Config, agent: RunningAgent) -> None:
    before = descriptors()
    with connected_client(config) as client, HostPool(PAGES, "ofparent") as pool:
        fill(client, pool)
        opened = descriptors() - before
        assert len(opened) > 3

        def look() -> None:
            left = descriptors() & opened
            assert all("ofparent" in name for name in left), left

        assert_succeeded(in_child(look))


def test_session_ends_with_its_process_although_a_child_lives_on(
    config: Config, agent: RunningAgent
) -> None:
    """Otherwise the child would keep the parent's pools mapped and their memory in use."""
    read, write = os.pipe()

    def make_and_fork() -> None:
        with connected_client(config) as client, HostPool(PAGES) as pool:
            fill(client, pool)
            os.write(write, b"%d" % in_child(lambda: time.sleep(15)))
            os._exit(0)

    assert_succeeded(in_child(make_and_fork))
    grandchild = int(os.read(read, 20))
    try:
        with connected_client(config) as client:

            def pools() -> int:
                report = client.status()
                assert report is not None
                return report.agent.pools

            eventually(lambda: pools() == 0)
        assert Path(f"/proc/{grandchild}").exists()
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_fork_that_python_does_not_see_shares_no_connection_either(
    config: Config, agent: RunningAgent
) -> None:
    connection = AgentConnection(agent.socket, b"", time.monotonic() + LIMIT)
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        try:
            connection.call(protocol.Status(), time.monotonic() + 1)
        except ConnectionLostError as error:
            os._exit(0 if "parent" in str(error) else 1)
        finally:
            os._exit(2)
    assert_succeeded(pid)
    reply = connection.call(protocol.Status(), time.monotonic() + LIMIT)
    assert isinstance(reply, protocol.StatusReport)
    connection.close()


def test_subprocesses_do_not_affect_the_client(client: AgentClient, pool: HostPool) -> None:
    fill(client, pool)
    subprocess.run(["true"], check=True)
    subprocess.run(["true"], check=True, preexec_fn=lambda: None)
    assert client.lookup(STORED).length == PAGES


def test_client_is_neither_pickled_nor_copied(client: AgentClient) -> None:
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="create one in each process"):
            take(client)


def find(config: Config, results: "multiprocessing.SimpleQueue[int]") -> None:
    with connected_client(config) as client:
        results.put(client.lookup(STORED).length)


def find_by(client: AgentClient, results: "multiprocessing.SimpleQueue[int]") -> None:
    results.put(client.lookup(STORED).length)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(
    config: Config,
    client: AgentClient,
    pool: HostPool,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    fill(client, pool)
    context = multiprocessing.get_context(method)
    results: multiprocessing.SimpleQueue[int] = context.SimpleQueue()
    own = context.Process(target=find, args=(config, results))  # type: ignore[attr-defined]
    own.start()
    own.join(LIMIT)
    assert results.get() == PAGES
    other = context.Process(target=find_by, args=(client, results))  # type: ignore[attr-defined]
    if method == "fork":
        other.start()
        other.join(LIMIT)
        assert results.get() == 0
    else:
        with pytest.raises(TypeError, match="create one in each process"):
            other.start()
    assert client.lookup(STORED).length == PAGES


def test_two_threads_cannot_use_one_connection(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with running_agent(config, "1.0") as agent:
        connection = AgentConnection(agent.socket, b"", time.monotonic() + LIMIT)
        request = protocol.LookupPages(STORED.namespace, b"".join(STORED.hashes), 5.0)
        replies: list[protocol.Reply] = []
        first = threading.Thread(
            target=lambda: replies.append(connection.call(request, time.monotonic() + LIMIT))
        )
        first.start()
        eventually(connection._busy.locked)
        for call in (connection.call, connection.call_with_buffers):
            with pytest.raises(RuntimeError, match="two threads use one connection"):
                call(protocol.Status(), time.monotonic() + 1)
        first.join()
        assert isinstance(replies[0], protocol.FoundPages)
        connection.close()
