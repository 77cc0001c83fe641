"""The client library with a real agent: pages round-trip, and the client follows agents that
restart.
"""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from memkv_sglang.agent import protocol
from memkv_sglang.agent.pools import RequestError
from memkv_sglang.agent.protocol import PROTOCOL_VERSION
from memkv_sglang.client import registry
from memkv_sglang.client.client import AgentClient
from memkv_sglang.client.connection import AgentConnection
from memkv_sglang.config.errors import ConfigError
from memkv_sglang.config.schema import AgentConfig, Config
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain, make_hashes
from memkv_sglang.tiers.base import LoadResult, Lookup, SpillResult
from tests.agent.agent_harness import (
    LIMIT,
    NAMESPACE,
    HostPool,
    RunningAgent,
    connected_client,
    entries,
    eventually,
    make_config,
    running_agent,
)

STORED, PRESENT = SpillResult.STORED, SpillResult.PRESENT
LOADED = PageLoad(LoadResult.LOADED, "memory")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def agent(config: Config) -> Iterator[RunningAgent]:
    with running_agent(config) as running:
        yield running


@pytest.fixture
def client(agent: RunningAgent, config: Config) -> Iterator[AgentClient]:
    with connected_client(config) as connected:
        yield connected


def test_pages_round_trip_into_any_buffers(client: AgentClient) -> None:
    chain = make_chain(NAMESPACE, 40, "bits")
    with HostPool(50) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        pool.fill(chain)
        spilled = client.spill(chain, pool.buffers(number, range(40)))
        assert spilled == [STORED] * 40
        assert client.lookup(chain) == Lookup(40, complete=True)
        pool.wipe()
        assert client.load(chain, pool.buffers(number, range(10, 50))) == [LOADED] * 40
        assert pool.holds(chain, first=10)
        assert pool.read(0) == bytes(len(pool.read(0)))
        assert client.spill(chain, pool.buffers(number, range(40))) == [PRESENT] * 40


def test_load_ends_at_the_first_missing_page(client: AgentClient) -> None:
    chain = make_chain(NAMESPACE, 8, "prefix")
    with HostPool(8) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        pool.fill(chain)
        head = Chain(chain.namespace, chain.hashes[:3])
        tail = Chain(chain.namespace, chain.hashes[3:5])
        client.spill(head, pool.buffers(number, range(3)))
        client.spill(tail, pool.buffers(number, range(3, 5)), before=chain.hashes[:3])
        assert client.lookup(chain) == Lookup(5, complete=True)
        loads = client.load(chain, pool.buffers(number, range(8)))
        assert [load.result is LoadResult.LOADED for load in loads] == [True] * 5 + [False] * 3


def test_namespace_clear_flush_and_status(client: AgentClient, agent: RunningAgent) -> None:
    chain = make_chain(NAMESPACE, 4, "clear")
    assert client.describe(NAMESPACE) == NAMESPACE.digest
    with HostPool(4) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        client.spill(chain, pool.buffers(number, range(4)))
        assert client.flush(1.0)
        report = client.status()
        assert report is not None and report.agent.pid == agent.pid
        assert report.engine.tiers[0].pages >= 4
        assert client.clear(NAMESPACE.digest) == report.engine.tiers[0].pages
        assert client.lookup(chain).length == 0


def test_several_pools_do_not_mix(client: AgentClient) -> None:
    chain = make_chain(NAMESPACE, 2, "pools")
    with HostPool(2) as one, HostPool(2) as two:
        numbers = [client.register_pool(pool.descriptor, pool.length) for pool in (one, two)]
        one.fill(chain)
        client.spill(chain, one.buffers(numbers[0], range(2)))
        assert client.load(chain, two.buffers(numbers[1], range(2))) == [LOADED] * 2
        assert two.holds(chain)


def test_concurrent_clients_and_calls(agent: RunningAgent, config: Config) -> None:
    failures: list[str] = []

    def use(client: AgentClient, pool: HostPool, number: int, worker: int) -> None:
        places = range(worker * 8, worker * 8 + 8)
        for round_ in range(10):
            chain = make_chain(NAMESPACE, 8, f"{id(client)}/{worker}/{round_}")
            pool.fill(chain, places[0])
            client.spill(chain, pool.buffers(number, places))
            for place in places:
                pool.write(place, bytes(8192))
            loads = client.load(chain, pool.buffers(number, places))
            if client.lookup(chain).length != 8 or loads != [LOADED] * 8:
                failures.append(f"{worker}: {loads}")
            if not pool.holds(chain, places[0]):
                failures.append(f"{worker}: wrong bytes")

    with (
        HostPool(32) as pool,
        connected_client(config) as one,
        connected_client(config) as two,
        HostPool(32) as other,
    ):
        threads = []
        for client, memory in ((one, pool), (two, other)):
            number = client.register_pool(memory.descriptor, memory.length)
            threads += [
                threading.Thread(target=use, args=(client, memory, number, worker))
                for worker in range(4)
            ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_bad_requests_are_misses(client: AgentClient) -> None:
    chain = make_chain(NAMESPACE, 2, "bad")
    with HostPool(2) as pool:
        number = client.register_pool(pool.descriptor, pool.length)
        outside = [
            [buffer._replace(offset=pool.length)] for [buffer, _] in pool.buffers(number, range(2))
        ]
        assert [load.result for load in client.load(chain, outside)] == [LoadResult.FAILED] * 2
        assert client.spill(chain, outside) == [SpillResult.REFUSED] * 2
        assert client.lookup(Chain(b"short", chain.hashes)) == Lookup(0, complete=False)
        huge = Chain(NAMESPACE.digest, [bytes(32)] * (1 << 20))
        assert client.lookup(huge, budget=LIMIT) == Lookup(0, complete=True)
        assert not any(client.present(huge, budget=LIMIT))
        assert client.spill(chain, pool.buffers(number, range(2))) == [STORED] * 2


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_calls_about_more_pages_than_fit_a_message_cover_the_whole_chain(
    client: AgentClient, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_HASHES", limit)
    chain = make_chain(NAMESPACE, 5, f"limit {limit}")
    with HostPool(5) as pool:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(5))
        for stored in range(1, 6):
            one = Chain(chain.namespace, chain.hashes[stored - 1 : stored])
            before = chain.hashes[: stored - 1]
            assert client.spill(one, buffers[stored - 1 : stored], before) == [STORED]
            assert client.lookup(chain) == Lookup(stored, complete=True)
            assert client.present(chain) == [True] * stored + [False] * (5 - stored)


def test_a_call_about_many_messages_keeps_its_budget(
    client: AgentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_HASHES", 1)
    sent: list[float] = []
    original = AgentClient._call

    def call(self: AgentClient, request: protocol.LookupPages, seconds: float) -> object:
        assert request.budget is not None
        sent.append(request.budget)
        return original(self, request, seconds)

    with HostPool(3) as pool:
        chain = make_chain(NAMESPACE, 3, "budget")
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(3))
        client.spill(chain, buffers)
    monkeypatch.setattr(AgentClient, "_call", call)
    assert client.lookup(chain, 0.5) == Lookup(3, complete=True)
    first, second, third = sent
    assert 0.5 >= first > second > third


def test_chain_may_exceed_the_limit_of_a_message(client: AgentClient) -> None:
    """A chain of more than a million tokens in small pages: its end is stored, its beginning is
    found.
    """
    before = make_hashes(protocol.MAX_HASHES + 1)
    chain = make_chain(NAMESPACE, 2, "end")
    with HostPool(2) as pool:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(2))
        parent = Chain(chain.namespace, before[-1:])  # no other call stores the end's parent
        assert client.spill(parent, buffers[:1]) == [STORED]
        assert client.spill(chain, buffers, before) == [STORED] * 2
    whole = Chain(chain.namespace, [*chain.hashes, *before])
    expected = [True] * 2 + [False] * (len(before) - 1) + [True]
    assert client.present(whole, budget=LIMIT) == expected


def test_unsealable_memory_is_refused(client: AgentClient) -> None:
    with HostPool(1, flags=0) as pool, pytest.raises(RequestError, match="MFD_ALLOW_SEALING"):
        client.register_pool(pool.descriptor, pool.length)


def test_without_an_agent_every_call_returns_at_once(tmp_path: Path) -> None:
    chain = make_chain(NAMESPACE, 3)
    client = AgentClient(make_config(tmp_path), start=False)
    with HostPool(3) as pool:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(3))
        assert not client.wait(0.05)
        assert client.describe(NAMESPACE) == NAMESPACE.digest
        assert client.lookup(chain) == Lookup(0, complete=False)
        assert [load.result for load in client.load(chain, buffers)] == [LoadResult.FAILED] * 3
        assert client.spill(chain, buffers) == [SpillResult.REFUSED] * 3
        assert client.clear(NAMESPACE.digest) == 0
        assert not client.flush(60)
        assert client.status() is None
        assert not client.shutdown()
        assert client.problem
        client.release_pool(0)
        client.close()
        client.close()
        assert client.lookup(chain) == Lookup(0, complete=False)


def test_connection_attempts_are_spaced_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memkv_sglang.client import reconnector

    attempts: list[Path] = []

    def refuse(path: Path) -> None:
        attempts.append(path)
        raise ConnectionRefusedError

    monkeypatch.setattr(reconnector, "Link", refuse)
    monkeypatch.setattr(reconnector, "RETRY_PAUSE", 0.2)
    client = AgentClient(make_config(tmp_path), start=False)
    chain = make_chain(NAMESPACE, 1)
    eventually(lambda: [client.lookup(chain) for _ in range(100)] and len(attempts) >= 3)
    assert len(attempts) == 3
    client.close()


def test_bad_socket_path_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"agent\.socket"):
        AgentClient(Config(agent=AgentConfig(socket="/" + "s" * 200)), start=False)


def test_new_agent_gets_the_newest_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Namespace] = []
    monkeypatch.setattr(registry, "announce_namespace", lambda _, namespace: told.append(namespace))
    known = registry.Registry()
    first, *others = [
        msgspec.structs.replace(NAMESPACE, revision=str(number))
        for number in range(registry.KEPT_NAMESPACES + 1)
    ]
    assert all(map(known.add_namespace, (first, *others[:-1])))
    assert not known.add_namespace(first)  # makes it the most recently used one
    assert known.add_namespace(others[-1])
    known.announce(cast(AgentConnection, None))
    assert told == [*others[1:-1], first, others[-1]]
    assert known.add_namespace(others[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_client_registers_everything_with_a_new_agent(tmp_path: Path, number: int) -> None:
    config = make_config(tmp_path)
    chain = make_chain(NAMESPACE, 4)
    with HostPool(4) as pool, running_agent(config) as first, connected_client(config) as client:
        buffers = pool.buffers(client.register_pool(pool.descriptor, pool.length), range(4))
        client.describe(NAMESPACE)
        assert client.spill(chain, buffers) == [STORED] * 4
        first.terminate(number)
        eventually(lambda: client.problem)
        assert client.spill(chain, buffers) == [SpillResult.REFUSED] * 4
        with running_agent(config) as second:
            assert client.wait(LIMIT)
            report = client.status()
            assert report is not None and report.agent.pid == second.pid
            assert report.agent.pools == 1
            pool.fill(chain)
            assert client.spill(chain, buffers) == [STORED] * 4
            pool.wipe()
            assert client.load(chain, buffers) == [LOADED] * 4
            assert pool.holds(chain)
            assert client.clear(client.describe(NAMESPACE)) == 4


def test_closed_client_leaks_no_threads_or_descriptors(agent: RunningAgent, config: Config) -> None:
    def use() -> None:
        with HostPool(1) as pool, connected_client(config) as client:
            client.register_pool(pool.descriptor, pool.length)
            threads = [threading.Thread(target=client.status) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    use()
    descriptors, threads = entries("/proc/self/fd"), threading.active_count()
    for _ in range(20):
        use()
    assert entries("/proc/self/fd") == descriptors
    assert threading.active_count() == threads


def test_problem_names_an_agent_of_another_version(
    agent: RunningAgent, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = PROTOCOL_VERSION, PROTOCOL_VERSION + 1
    monkeypatch.setattr("memkv_sglang.agent.protocol.PROTOCOL_VERSION", other)
    client = AgentClient(config, start=True)
    eventually(lambda: f"version {own}, this client {other}" in client.problem)
    assert not client.wait(0.05)
    client.close()
