"""Conversations on real servers while one is killed, returns, hangs, is added and removed.

Every byte that is loaded is compared. `tests/agent/test_assembly.py` has a short form of this.
"""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.tcp_proxy import Fault, TcpProxy
from prometheus_client import CollectorRegistry

from memkv_sglang.agent.assembly import build_engine
from memkv_sglang.config.schema import Config, EngineConfig, MinioConfig, ShardConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import holds_content, make_chain, make_namespace, make_page
from memkv_sglang.tiers.base import LoadResult, SpillResult
from tests.engine.engines import wait_until

LENGTHS = (16384, 16384)
NAMESPACE = make_namespace(page_bytes=sum(LENGTHS))
TURNS = (10, 25, 40)
"""Pages of a conversation after each of its turns."""

CONVERSATIONS, CALLERS = 6, 3

FEW = 0.1 * CONVERSATIONS * TURNS[-1]
"""Limit of pages that are stored again although none was lost, because a load was answered too
late."""


class Traffic:
    """Callers that go through their conversations again and again. No two share a page."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.wrong: list[PageKey] = []
        self.errors: list[BaseException] = []
        self.turns = 0
        self.stored = self.loaded = 0
        self._lock = threading.Lock()
        self._may_run = threading.Event()
        self._idle = threading.Semaphore(CALLERS)
        self._ending = False
        self._threads = [
            threading.Thread(target=self._converse, args=(number,)) for number in range(CALLERS)
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._ending = True
            self._may_run.set()
            for thread in self._threads:
                thread.join()

    @contextmanager
    def on(self, engine: Engine) -> Iterator[None]:
        """Use an engine during the context, and close it."""
        self.engine = engine
        self._may_run.set()
        try:
            yield
        finally:
            self._may_run.clear()
            for _ in range(CALLERS):
                self._idle.acquire()
            engine.close(drain=0)
            self._idle.release(CALLERS)

    def go_on(self, turns: int = 3 * CONVERSATIONS) -> None:
        """Wait until the callers have made more turns."""
        before = self.turns
        wait_until(lambda: bool(self.errors) or self.turns >= before + turns)
        assert not self.errors, self.errors[0]

    def _converse(self, number: int) -> None:
        try:
            while not self._ending:
                for seed in range(number, CONVERSATIONS, CALLERS):
                    chain = make_chain(NAMESPACE, TURNS[-1], f"conversation {seed}")
                    for length in TURNS:
                        self._may_run.wait()
                        with self._idle:
                            if self._may_run.is_set() and not self._ending:
                                self.turn(Chain(chain.namespace, chain.hashes[:length]))
        except BaseException as error:
            self.errors.append(error)

    def turn(self, chain: Chain) -> int:
        """Load what is found, compare it, and store the rest; return how many were loaded."""
        assert self.engine is not None
        found = self.engine.lookup(chain)
        keys = chain.keys()
        pages = [make_page(key, LENGTHS, filled=False) for key in keys[: found.length]]
        results = [one.result for one in self.engine.load(pages)]
        for page, result in zip(pages, results, strict=True):
            if result is LoadResult.LOADED and not holds_content(page):
                self.wrong.append(page.key)
        loaded = [*(one is LoadResult.LOADED for one in results), False].index(False)
        rest = [make_page(key, LENGTHS, filled=True) for key in keys[loaded:]]
        stored = self.engine.spill(rest).count(SpillResult.STORED)
        with self._lock:
            self.stored, self.loaded = self.stored + stored, self.loaded + loaded
            self.turns += 1
        return loaded

    def settled(self) -> bool:
        """Return whether every conversation can be loaded completely."""
        chains = [
            make_chain(NAMESPACE, TURNS[-1], f"conversation {seed}")
            for seed in range(CONVERSATIONS)
        ]
        return all(self.turn(chain) == TURNS[-1] for chain in chains)

    def stored_during(self, action: Callable[[], None]) -> int:
        """Act, wait until everything can be loaded again, and return how many pages were stored."""
        before = self.stored
        action()
        self.go_on()
        wait_until(self.settled)
        return self.stored - before


class Servers:
    """Three servers, each behind a proxy."""

    def __init__(self, stack: ExitStack) -> None:
        self.servers = [stack.enter_context(MinioServer()) for _ in range(3)]
        self.proxies = [
            stack.enter_context(TcpProxy(server.host, server.port)) for server in self.servers
        ]
        self._bucket = f"test-{uuid.uuid4().hex}"

    def engine(self, numbers: list[int], replicas: int) -> Engine:
        shards = tuple(
            ShardConfig(
                name=f"s{number}",
                endpoint=self.proxies[number].url,
                access_key=self.servers[number].access_key,
                secret_key=self.servers[number].secret_key,
            )
            for number in numbers
        )
        minio = MinioConfig(
            bucket=self._bucket, shards=shards, replicas=replicas, stall_timeout=0.5
        )
        engine = EngineConfig(breaker_cooldown=0.3, lookup_budget=1.0, skip_slow_loads=False)
        config = Config(minio=msgspec.structs.replace(minio, negative_ttl=0.0), engine=engine)
        return build_engine(config, CollectorRegistry())


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_conversations_survive_every_fault_of_a_shard(replicas: int) -> None:
    with ExitStack() as stack:
        servers, traffic = Servers(stack), Traffic()
        pages = CONVERSATIONS * TURNS[-1]
        stack.enter_context(traffic.running())
        with traffic.on(servers.engine([0, 1], replicas)):
            wait_until(traffic.settled)
            assert traffic.stored >= pages

            killed = traffic.stored_during(servers.servers[1].kill)
            if replicas == 1:
                assert 0 < killed < pages, "only the dead shard's pages are stored again"
            else:
                assert killed < FEW

            assert traffic.stored_during(servers.servers[1].start) < FEW

            def hang() -> None:
                servers.proxies[0].fault = Fault("stall")

            traffic.stored_during(hang)
            servers.proxies[0].fault = None
            traffic.go_on()
            wait_until(traffic.settled)

            servers.proxies[0].rate = 300_000
            traffic.go_on(CONVERSATIONS)
            servers.proxies[0].rate = None
        with traffic.on(servers.engine([0, 1, 2], replicas)):  # a shard is added
            assert traffic.stored_during(lambda: None) < FEW
        with traffic.on(servers.engine([1, 2], replicas)):  # a shard is removed
            assert traffic.stored_during(lambda: None) < pages
        assert traffic.wrong == []
        assert traffic.loaded > 5 * pages
