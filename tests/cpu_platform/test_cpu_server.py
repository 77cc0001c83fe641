"""Real servers on a plain CPU: HiCache with SGLang's own `file` storage."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")
pytest.importorskip("sglang_router", reason="needs sglang-router 0.3.2")

from sglang_cpu_platform import tiny_model
from sglang_cpu_platform.client import Answer
from sglang_cpu_platform.process import group_members
from sglang_cpu_platform.router import Router
from sglang_cpu_platform.server import CpuServer

PAGE = 64
PROMPT = random.Random(7).choices(range(5, 261), k=3000)
# The last prompt token is always computed: hits end at a page before it.
REUSED = (len(PROMPT) - 1) // PAGE * PAGE
HICACHE = [
    "--enable-hierarchical-cache",
    "--hicache-storage-backend", "file",
    "--hicache-storage-prefetch-policy", "wait_complete",
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("servers")
    tiny_model.make(work / "mha", "mha")
    tiny_model.make(work / "mla", "mla")
    return work


def server(work: Path, kind: str, name: str, tp: int = 1) -> CpuServer:
    storage = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(work / f"{kind}-pages")}
    return CpuServer(
        work / kind,
        log=work / f"{name}.log",
        page_size=PAGE,
        tp=tp,
        max_total_tokens=8192,
        extra=HICACHE,
        env=storage,
    )


def start(stack: ExitStack, *servers: CpuServer) -> None:
    for each in servers:
        stack.callback(each.stop)
        each.start()
    for each in servers:
        each.wait_ready()


@dataclass(frozen=True)
class Cluster:
    mha: list[CpuServer]
    mla_tp2: CpuServer
    computed: dict[str, Answer]
    """Answers of servers that had nothing to reuse."""


@pytest.fixture(scope="module")
def cluster(work: Path) -> Iterator[Cluster]:
    """Two MHA servers and an MLA server on two ranks; what they were asked first is stored.

    The first MHA server has lost its pools since, the MLA server is another one than before.
    """
    first, before = server(work, "mha", "first-mha"), server(work, "mla", "mla")
    second, mla_tp2 = server(work, "mha", "second-mha"), server(work, "mla", "mla-tp2", tp=2)
    with ExitStack() as stack:
        start(stack, first, before)
        computed = {"mha": first.client.generate(PROMPT), "mla": before.client.generate(PROMPT)}
        first.client.flush_cache()
        before.client.flush_cache()  # waits for the pages to be stored, too
        before.stop()
        start(stack, second, mla_tp2)
        yield Cluster([first, second], mla_tp2, computed)


def test_children_are_forks_that_need_no_imports(cluster: Cluster) -> None:
    members = group_members(cluster.mla_tp2.pid)
    assert len(members) > 3
    for pid in members:
        assert b"spawn_main" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_nothing_is_reused_at_first(cluster: Cluster) -> None:
    assert all(answer.cached_tokens == 0 for answer in cluster.computed.values())
    assert all(len(set(answer.output_ids)) > 3 for answer in cluster.computed.values())


def test_servers_behind_a_router_reuse_what_is_stored(cluster: Cluster, work: Path) -> None:
    with Router([s.url for s in cluster.mha], log=work / "router.log") as router:
        answers = [router.client.generate(PROMPT) for _ in range(4)]
    assert [a.output_ids for a in answers] == [cluster.computed["mha"].output_ids] * 4
    sources = sorted(
        tuple(source for source, tokens in a.cached_by_source.items() if tokens == REUSED)
        for a in answers
    )
    assert sources == [("device",), ("device",), ("storage",), ("storage",)]


def test_two_ranks_reuse_the_latent_pages_that_one_rank_stored(cluster: Cluster) -> None:
    answer = cluster.mla_tp2.client.generate(PROMPT)
    assert answer.cached_by_source["storage"] == REUSED
    assert answer.output_ids == cluster.computed["mla"].output_ids


def test_a_stopped_server_leaves_no_process(cluster: Cluster) -> None:
    group = cluster.mla_tp2.pid
    assert group_members(group)
    cluster.mla_tp2.stop()
    assert group_members(group) == []
