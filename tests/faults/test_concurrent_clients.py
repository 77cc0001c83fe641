"""Random histories of concurrent clients, with the agent killed in between."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from memkv_testbed.chain_memory import ChainMemory
from memkv_testbed.faults.cluster import NAMESPACE, PAGE_BYTES
from memkv_testbed.faults.node import Node
from memkv_testbed.faults.rounds import Rounds

from memkv_sglang.page import Chain, PageKey
from memkv_sglang.testing.pages import make_hashes
from memkv_sglang.tiers.base import LoadResult, SpillResult

CLIENTS = 3
DEPTH = 6
BRANCHES = 3


class Call(NamedTuple):
    client: int
    verb: Literal["spill", "load", "lookup"]
    branch: int
    length: int


CALLS = st.lists(
    st.builds(
        Call,
        client=st.integers(0, CLIENTS - 1),
        verb=st.sampled_from(["spill", "load", "lookup"]),
        branch=st.integers(0, BRANCHES - 1),
        length=st.integers(1, DEPTH),
    ),
    min_size=1,
    max_size=8,
)

_histories = itertools.count()


class ConcurrentClients(RuleBasedStateMachine):
    """The model is exact between steps; within a step a spilled page may or may not be found."""

    def __init__(self, node: Node, memories: Sequence[ChainMemory]) -> None:
        super().__init__()
        self.node = node
        self.memories = memories
        self.stored: set[PageKey] = set()
        self.killed = False
        history = next(_histories)
        trunk = make_hashes(DEPTH // 2, f"history {history}")
        self.branches = [
            trunk + make_hashes(DEPTH - len(trunk), f"branch {i}", trunk[-1])
            for i in range(BRANCHES)
        ]

    def chain(self, call: Call) -> Chain:
        return Chain(NAMESPACE.digest, self.branches[call.branch][: call.length])

    @rule(calls=CALLS)
    def call_at_one_time(self, calls: list[Call]) -> None:
        spilled = {k for c in calls if c.verb == "spill" for k in self.chain(c).keys()}
        by_client: dict[int, list[Call]] = defaultdict(list)
        for call in calls:
            by_client[call.client].append(call)
        with ThreadPoolExecutor(CLIENTS) as threads:
            for _ in threads.map(lambda mine: self.carry_out(mine, spilled), by_client.values()):
                pass  # raises the exceptions of the threads
        self.stored |= spilled

    def carry_out(self, calls: list[Call], spilled: set[PageKey]) -> None:
        for call in calls:
            memory, chain = self.memories[call.client], self.chain(call)
            keys = chain.keys()
            if call.verb == "spill":
                kept = {SpillResult.STORED, SpillResult.PRESENT}
                assert set(memory.spill(chain)) <= kept
                continue
            if call.verb == "lookup":
                found = memory.client.lookup(chain, budget=4.0).length
            else:
                loaded = [load.result is LoadResult.LOADED for load in memory.load(chain)]
                found = [*loaded, False].index(False)
                assert not any(loaded[found:])
                assert all(memory.holds(i, keys[i]) for i in range(found))
            certain = next((i for i, k in enumerate(keys) if k not in self.stored), len(keys))
            assert found >= certain
            assert set(keys[:found]) <= self.stored | spilled

    @precondition(lambda self: not self.killed)
    @rule()
    def kill_the_agent(self) -> None:
        self.killed = True
        pid = self.node.agent_pid()
        self.node.end_agent()
        for memory in self.memories:
            self.node.wait_for_another(memory.client, pid)


@pytest.mark.soak
def test_concurrent_clients(rounds: Rounds) -> None:
    node = rounds.cluster.disk_node
    clients = [node.connect() for _ in range(CLIENTS)]
    memories = [ChainMemory(client, DEPTH, PAGE_BYTES) for client in clients]
    try:
        run_state_machine_as_test(
            lambda: ConcurrentClients(node, memories),  # type: ignore[arg-type]  # takes a factory too
            settings=settings(
                max_examples=8,
                stateful_step_count=8,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        for client in clients:
            client.close()
