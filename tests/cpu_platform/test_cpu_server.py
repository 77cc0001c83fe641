"""Real servers on a plain CPU: HiCache with SGLang's own `file` storage."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sglang", reason="needs an environment with SGLang 0.5.23")

from sglang_cpu_platform import tiny_model
from sglang_cpu_platform.fork_server import ForkServers
from sglang_cpu_platform.process import ProcessFailedError, group_members, shared_memory_of
from sglang_cpu_platform.server import CpuServer

PAGE = 64
PROMPT = random.Random(7).choices(range(5, 261), k=3000)
# The last prompt token is always computed, so hits end at the page boundary before it.
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


def server(work: Path, kind: str, forks: ForkServers, tp: int = 1) -> CpuServer:
    storage = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(work / f"{kind}-pages")}
    return CpuServer(
        work / kind,
        log=work / f"{kind}.log",
        page_size=PAGE,
        tp=tp,
        max_total_tokens=8192,
        extra=HICACHE,
        env=storage,
        forks=forks,
    )


@pytest.fixture(scope="module")
def mha(work: Path, forks: ForkServers) -> Iterator[CpuServer]:
    with server(work, "mha", forks) as started:
        yield started


@pytest.fixture(scope="module")
def mla(work: Path, forks: ForkServers) -> Iterator[CpuServer]:
    with server(work, "mla", forks, tp=2) as started:
        yield started


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("mha", marks=pytest.mark.soak),
        pytest.param("mla", marks=pytest.mark.slow),
    ],
)
def test_stored_pages_are_reused_with_the_same_text(
    kind: str, request: pytest.FixtureRequest
) -> None:
    client = request.getfixturevalue(kind).client
    computed = client.generate(PROMPT)
    assert computed.cached_tokens == 0
    assert len(set(computed.output_ids)) > 3
    for source in ("device", "storage"):
        answer = client.generate(PROMPT)
        assert {s for s, tokens in answer.cached_by_source.items() if tokens} == {source}
        assert answer.cached_tokens == REUSED
        assert answer.output_ids == computed.output_ids
        client.flush_cache()  # also waits until the pages are stored


def test_children_are_forks_that_need_no_imports(mha: CpuServer) -> None:
    members = group_members(mha.pid)
    assert len(members) >= 3
    for pid in members:
        assert b"spawn_main" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_fork_looks_like_a_server_that_was_started(mha: CpuServer) -> None:
    process = Path(f"/proc/{mha.pid}")
    title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    assert "-m sglang.launch_server --model-path" in title
    assert os.getsid(mha.pid) == mha.pid
    assert (process / "fd" / "0").readlink() == Path(os.devnull)


def test_a_fork_server_that_ended_is_an_error_with_its_output(tmp_path: Path) -> None:
    """Here it exits because /bin/cat is not a Python interpreter."""
    forks = ForkServers()
    broken = CpuServer(tmp_path, log=tmp_path / "log", python="/bin/cat", forks=forks)
    with pytest.raises(ProcessFailedError, match="fork server"):
        broken.start()
    forks.close()


def test_stopped_server_leaves_neither_processes_nor_shared_memory(mha: CpuServer) -> None:
    group = mha.pid
    mapped = shared_memory_of(group)
    assert mapped
    mha.stop()
    assert group_members(group) == []
    assert not any(path.exists() for path in mapped)
