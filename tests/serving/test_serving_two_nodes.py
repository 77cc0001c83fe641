"""One tensor-parallel group over two machines, each with an agent and a disk of its own."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from memkv_testbed.machines import CABLE, Machine, refusal, two_machines
from memkv_testbed.minio_server import MinioServer
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.server import CpuServer, free_port
from typing_extensions import override

from memkv_sglang.config.schema import MinioConfig
from tests.serving.conftest import Models
from tests.serving.node import (
    DEVICE_TOKENS,
    LIMIT,
    NEW_TOKENS,
    Node,
    Tokens,
    from_storage,
    libraries,
    prompt,
    reusable,
    start_all,
    wait_until,
    whole_pages,
)

pytestmark = [
    pytest.mark.slow,  # three servers for each kind of attention
    pytest.mark.timeout(900),  # the first test of a kind waits for its servers
    pytest.mark.skipif(bool(refusal()), reason=refusal()),
]

LENGTH = 1500


class GroupNode(Node):
    """One machine of the group. Only the first answers requests."""

    @override
    def wait_ready(self) -> None:
        self._server.wait_ready()
        self.wait_for_agent()


class Group(NamedTuple):
    kind: str
    storage: MinioServer
    first: GroupNode
    second: GroupNode
    plain: CpuServer

    @property
    def nodes(self) -> list[GroupNode]:
        return [self.first, self.second]

    def recompute(self, tokens: Tokens) -> list[int]:
        return self.plain.client.generate(tokens, max_new_tokens=NEW_TOKENS).output_ids

    def share(self) -> None:
        """Empty the pools of both nodes; wait until everything computed is in the shared tier."""
        self.first.flush()
        for node in self.nodes:
            with node.agent() as agent:
                assert agent.flush(LIMIT)


@pytest.fixture(scope="module", params=["mha", "mla"])
def group(request: pytest.FixtureRequest, home: Path, models: Models) -> Iterator[Group]:
    kind = request.param
    model, rendezvous = getattr(models, kind), free_port()
    plain = CpuServer(
        model,
        log=home / f"plain-group-{kind}.log",
        tp=2,
        max_total_tokens=DEVICE_TOKENS,
        extra=["--disable-radix-cache"],
        env=libraries(home),
        forks=Node.forks,
    )
    with ExitStack() as stack:
        machines = stack.enter_context(two_machines())
        GroupNode.forks = ForkServers()  # these start the servers inside the machines
        stack.callback(GroupNode.forks.close)
        storage = stack.enter_context(MinioServer(host=machines.outside))
        shared = MinioConfig(
            endpoint=storage.endpoint,
            bucket="pages",
            access_key=storage.access_key,
            secret_key=storage.secret_key,
        )

        def node(rank: int, machine: Machine) -> GroupNode:
            return GroupNode(
                f"{kind}-{rank}",
                home,
                shared,
                model,
                tp=2,
                extra=[
                    *("--nnodes", "2", "--node-rank", str(rank)),
                    *("--dist-init-addr", f"{machines.first.address}:{rendezvous}"),
                ],
                env={
                    "GLOO_SOCKET_IFNAME": CABLE,
                    "SGLANG_HOST_IP": machine.address,
                    "SGLANG_CPU_OMP_THREADS_BIND": str(rank),
                    "no_proxy": machine.address,
                    # The second node looked for the pages of the first before they were uploaded.
                    "MEMKV_MINIO_NEGATIVE_TTL": "0",
                },
                server=partial(CpuServer, host=machine.address, prefix=machine.prefix),
            )

        first, second = node(0, machines.first), node(1, machines.second)
        for close in (plain.kill, first.close, second.close):
            stack.callback(close)
        start_all(plain, first, second)
        yield Group(kind, storage, first, second, plain)


def test_texts_stay_the_same_and_all_pages_come_from_storage(group: Group) -> None:
    prompts = [prompt(f"group {i}", 300 + 40 * i) for i in range(30)]
    computed = [group.recompute(tokens) for tokens in prompts]
    assert [group.first.generate(tokens).output_ids for tokens in prompts] == computed
    group.share()
    answers = [group.first.generate(tokens) for tokens in prompts]
    assert [answer.output_ids for answer in answers] == computed
    assert [from_storage(answer) for answer in answers] == [reusable(len(p)) for p in prompts]


def test_a_changed_token_ends_the_reuse_at_its_page(group: Group) -> None:
    base = prompt("changed in the group", LENGTH)
    group.first.generate(base)
    group.share()
    for point in (1, 300, 700, LENGTH - 2):
        tokens = [*base[:point], (base[point] + 1) % 250 + 5, *prompt(point, 300)]
        answer = group.first.generate(tokens)
        assert from_storage(answer) == whole_pages(point), point
        assert answer.output_ids == group.recompute(tokens), point
        group.share()


def test_without_minio_nodes_load_what_is_on_their_disks(group: Group) -> None:
    """With latent attention only the first rank stores, so the second node has only what it has
    loaded twice.
    """
    once, often = prompt("stored by the group", LENGTH), prompt("used by the group", LENGTH)
    texts = [group.first.generate(tokens).output_ids for tokens in (once, often)]
    for _ in range(2):
        group.share()
        assert from_storage(group.first.generate(often)) == reusable(LENGTH)
    group.share()
    group.storage.kill()
    try:
        answers = [group.first.generate(tokens) for tokens in (once, often)]
        group.first.flush()
    finally:
        group.storage.start()
    assert [answer.output_ids for answer in answers] == texts
    found = [from_storage(answer) for answer in answers]
    assert found == [reusable(LENGTH) if group.kind == "mha" else 0, reusable(LENGTH)]


def test_restarted_nodes_load_from_a_disk_and_from_minio(group: Group) -> None:
    """The second node has lost its disk."""
    tokens = prompt("before the restart", LENGTH)
    text = group.first.generate(tokens).output_ids
    group.share()
    for node in group.nodes:
        node.kill_server()
    group.second.stop_agent()
    group.second.forget_disk()
    start_all(*group.nodes)
    answer = group.first.generate(tokens)
    assert from_storage(answer) == reusable(LENGTH)
    assert answer.output_ids == text


def test_a_node_without_an_agent_makes_the_group_miss(group: Group) -> None:
    tokens = prompt("one agent killed", LENGTH)
    text = group.first.generate(tokens).output_ids
    group.share()
    group.second.kill_agent()
    answer = group.first.generate(tokens)
    # A hit if the server has restarted the agent in time.
    assert answer.cached_tokens in (0, reusable(LENGTH))
    assert answer.output_ids == text
    group.second.wait_for_agent()
    wait_until(lambda: group.first.stored(tokens) == reusable(LENGTH))
