"""One of several disks fails under traffic, and returns."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from memkv_testbed.chain_memory import ChainMemory
from memkv_testbed.faults.cluster import ENGINE, NAMESPACE, PAGE_BYTES
from memkv_testbed.faults.faulty_agent import DISK_FAULT
from memkv_testbed.faults.node import Node, wait_until

from memkv_sglang.config.schema import MIB, AgentConfig, Config, MinioConfig, NvmeConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_chain
from memkv_sglang.tiers.base import LoadResult, SpillResult

PAGES = 24
"""Pages of a chain."""
THREADS = 2


class Traffic:
    """Spills and loads chains on some threads without pause, and compares every byte."""

    def __init__(self, node: Node) -> None:
        self.acknowledged: list[Chain] = []
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(ChainMemory(node.client, PAGES, PAGE_BYTES), name)
            )
            for name in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, memory: ChainMemory, name: int) -> None:
        turn = 0
        try:
            while not self._stop.is_set():
                chain = make_chain(NAMESPACE, PAGES, f"{name} {turn}")
                if max(memory.spill(chain)) <= SpillResult.PRESENT:
                    self.acknowledged.append(chain)
                compare(memory, chain)
                compare(memory, make_chain(NAMESPACE, PAGES, f"{name} {turn // 2}"))
                turn += 1
        except BaseException as error:  # the main thread reports it
            self.errors.append(error)

    def wait_for(self, chains: int) -> None:
        """Wait until so many more chains were acknowledged."""
        wanted = len(self.acknowledged) + chains
        wait_until(lambda: len(self.acknowledged) >= wanted or self.errors)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.errors == []


def compare(memory: ChainMemory, chain: Chain) -> int:
    """Load a chain; check the pages that are loaded and return how many there are."""
    loads = memory.load(chain)
    loaded = [i for i, load in enumerate(loads) if load.result is LoadResult.LOADED]
    for i in loaded:
        assert memory.holds(i, chain.keys()[i])
    return len(loaded)


@pytest.fixture
def node(
    tmp_path: Path, minio_config: MinioConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Node]:
    monkeypatch.setenv(DISK_FAULT, str(tmp_path / "fault"))
    (tmp_path / "run").mkdir(mode=0o700)
    config = Config(
        agent=AgentConfig(socket=str(tmp_path / "run" / "agent.sock")),
        engine=ENGINE,
        nvme=NvmeConfig(directory=f"{tmp_path}/a,{tmp_path}/b", capacity=256 * MIB),
        minio=minio_config,
    )
    node = Node(config)
    node.client.describe(NAMESPACE)
    yield node
    node.close()


@pytest.mark.parametrize("times", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_disk_that_fails_under_traffic_costs_no_page_and_returns(
    node: Node, tmp_path: Path, times: int
) -> None:
    def problem() -> str:
        report = node.client.status()
        return (report and report.engine.tiers[0].problem) or ""

    traffic = Traffic(node)
    try:
        for turn in range(times):
            failing = tmp_path / "ab"[turn % 2]
            traffic.wait_for(4)
            (tmp_path / "fault").write_text(f"EIO {failing}")
            wait_until(lambda: "1 of 2 disks" in problem() or traffic.errors, "the disk fails")
            (tmp_path / "fault").unlink()
            wait_until(lambda: problem() == "" or traffic.errors, "the disk returns")
    finally:
        traffic.stop()
    node.flush()
    memory = ChainMemory(node.client, PAGES, PAGE_BYTES)
    for chain in traffic.acknowledged:
        assert compare(memory, chain) == PAGES
