"""A client that reuses its memory during a load harms nobody but itself."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from memkv_testbed.host_pool import HostPool
from memkv_testbed.processes import ending
from minio import Minio

from memkv_sglang.agent import protocol
from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import (
    MIB,
    AgentConfig,
    Config,
    EngineConfig,
    MinioConfig,
    NvmeConfig,
)
from memkv_sglang.page import Buffer, Chain, Page
from memkv_sglang.testing.conformance import soon
from memkv_sglang.testing.pages import make_chain, make_namespace, page_content
from memkv_sglang.tiers.base import LoadResult, SpillResult
from memkv_sglang.tiers.minio.names import ObjectNames
from memkv_sglang.tiers.minio.tier import MinioTier
from tests.agent.agent_harness import RawClient

PAGE = 256 << 10
PAGES = 32
LIMIT = 60.0
NAMESPACE = make_namespace(PAGE)
KEY_FILE = f'write = "k"\n[keys]\nk = "{"ab" * 32}"\n'


class Server:
    """A client of an agent with memory for one chain."""

    def __init__(self, config: Config, *, start: bool = False) -> None:
        self.config = config
        self.client = AgentClient(config, start=start)
        assert self.client.wait(LIMIT), self.client.problem
        self.pool = HostPool(PAGES, PAGE, parts=1)
        self.number = self.client.register_pool(self.pool.descriptor, self.pool.length)
        self.client.describe(NAMESPACE)

    def spill(self, chain: Chain) -> None:
        """Store the right content of a chain, in every tier."""
        self.pool.fill(chain)
        deadline = time.monotonic() + LIMIT
        while max(self.client.spill(chain, self.buffers())) > SpillResult.PRESENT:
            assert time.monotonic() < deadline, "the chain was not stored"
        assert self.client.flush(LIMIT)

    def load(self, chain: Chain) -> tuple[list[str], list[int]]:
        """Return the tier of each loaded page, and the pages with wrong content."""
        self.pool.memory[:] = bytes(self.pool.length)
        loads = self.client.load(chain, self.buffers())
        there = [load.result is LoadResult.LOADED for load in loads]
        wrong = [i for i in self.pool.wrong(chain) if there[i]]
        return [load.tier for load in loads if load.tier], wrong

    def buffers(self) -> list[list[Buffer]]:
        return self.pool.buffers(self.number, range(PAGES))


@contextmanager
def agent(home: Path, minio: MinioConfig, *, disk: bool = True) -> Iterator[Server]:
    """Start an agent; yield the client that started it."""
    config = Config(
        agent=AgentConfig(socket=str(home / "run" / "agent.sock"), drain_timeout=1.0),
        nvme=NvmeConfig(directory=str(home / "pages"), capacity=256 * MIB)
        if disk
        else NvmeConfig(),
        minio=minio,
        engine=EngineConfig(promote="second_use"),
    )
    server = Server(config, start=True)
    report = server.client.status()
    assert report is not None
    try:
        yield server
    finally:
        with ending(report.agent.pid):
            server.client.shutdown()
            server.client.close()


@contextmanager
def scribbling(memory: memoryview) -> Iterator[None]:
    """Write to memory as fast as possible, like a server that reuses its pages."""
    over = threading.Event()
    junk = b"\xee" * len(memory)

    def scribble() -> None:
        while not over.is_set():
            memory[:] = junk

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(params=["plain", pytest.param("encrypted", marks=pytest.mark.slow)])
def minio(request: pytest.FixtureRequest, minio_config: MinioConfig, tmp_path: Path) -> MinioConfig:
    if request.param == "plain":
        return minio_config
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(KEY_FILE)
    return MinioConfig(
        endpoint=minio_config.endpoint,
        bucket=minio_config.bucket,
        access_key=minio_config.access_key,
        secret_key=minio_config.secret_key,
        encryption_key_file=str(keys),
    )


def test_pages_overwritten_during_their_load_are_not_promoted(
    minio: MinioConfig, tmp_path: Path
) -> None:
    chains = [make_chain(NAMESPACE, PAGES, f"promoted {i}") for i in range(3)]
    with agent(tmp_path / "writer", minio, disk=False) as writer:
        for chain in chains:
            writer.spill(chain)
    with agent(tmp_path / "reader", minio) as owner:
        bad, good = Server(owner.config), Server(owner.config)
        wrong, tiers = [], set()
        for chain in chains:
            for _ in range(2):  # a page is promoted at its second load
                with scribbling(bad.pool.memory):
                    bad.client.load(chain, bad.buffers())
            assert good.client.flush(LIMIT)
            found, bad_pages = good.load(chain)
            assert len(found) == PAGES
            tiers.update(found)
            wrong += bad_pages
        assert wrong == []
        # Pages that the client does not change are still promoted.
        for _ in range(2):
            good.load(chains[0])
        assert good.client.flush(LIMIT)
        assert good.load(chains[0]) == (["nvme"] * PAGES, [])


@pytest.mark.parametrize("tier", ["nvme", "minio"])
def test_page_that_waits_for_an_equal_load_gets_the_right_bytes(
    minio: MinioConfig, tmp_path: Path, tier: str
) -> None:
    chain = make_chain(NAMESPACE, PAGES, "followed")
    with agent(tmp_path, minio, disk=tier == "nvme") as owner:
        owner.spill(chain)
        bad, good = Server(owner.config), Server(owner.config)
        over = threading.Event()

        def load_badly() -> None:
            while not over.is_set():
                bad.client.load(chain, bad.buffers())

        thread = threading.Thread(target=load_badly)
        with scribbling(bad.pool.memory):
            thread.start()
            try:
                for _ in range(20):
                    found, wrong = good.load(chain)
                    assert len(found) == PAGES
                    assert wrong == []
            finally:
                over.set()
                thread.join()


def test_memory_reused_after_a_client_hung_up_during_a_load(
    minio: MinioConfig, tmp_path: Path
) -> None:
    chain = make_chain(NAMESPACE, PAGES, "closed")
    with agent(tmp_path / "writer", minio, disk=False) as writer:
        writer.spill(chain)
    with agent(tmp_path / "reader", minio) as owner:
        good = Server(owner.config)
        wrong = []
        for _ in range(4):
            memory = HostPool(PAGES, PAGE, parts=1)
            with scribbling(memory.memory), RawClient(Path(owner.config.agent.socket)) as raw:
                raw.greet()
                raw.ask(protocol.RegisterPool(0, memory.length), memory.descriptor)
                raw.send(
                    protocol.LoadPages(
                        chain.namespace, b"".join(chain.hashes), memory.buffers(0, range(PAGES))
                    )
                )
                raw.close()
                found, bad_pages = good.load(chain)
            assert len(found) == PAGES
            wrong += bad_pages
            assert good.client.flush(LIMIT)
            wrong += good.load(chain)[1]
        assert wrong == []


def test_object_outlives_a_client_that_overwrites_its_page(
    minio: MinioConfig, admin: Minio
) -> None:
    """A page that a client changed in its own memory does not mean that the object is corrupt."""
    key = make_chain(NAMESPACE, 1, "set aside").keys()[0]
    content = page_content(key, PAGE)
    with closing(MinioTier(minio)) as tier:
        page = Page(key, (memoryview(bytearray(content)),))
        assert tier.spill([page], soon()) == [SpillResult.STORED]
    with closing(MinioTier(minio)) as tier:
        half = memoryview(bytearray(PAGE // 2))
        # Both halves of the page are loaded into the same memory.
        tier.load([Page(key, (half, half))], soon())
        whole = Page(key, (memoryview(bytearray(PAGE)),))
        assert tier.load([whole], soon()) == [LoadResult.LOADED]
        assert whole.buffers[0] == content
    names = [item.object_name or "" for item in admin.list_objects(minio.bucket, recursive=True)]
    assert [name for name in names if name.startswith("quarantine/")] == []


def test_other_nodes_get_no_page_that_a_client_overwrote(
    minio: MinioConfig, admin: Minio, tmp_path: Path
) -> None:
    """If the bucket loses its pages, the copies on a node's disk are uploaded again."""
    chain, names = make_chain(NAMESPACE, PAGES, "fleet"), ObjectNames(minio.prefix)
    with agent(tmp_path / "writer", minio, disk=False) as writer:
        writer.spill(chain)
    with agent(tmp_path / "node", minio) as owner:
        bad, good = Server(owner.config), Server(owner.config)
        for _ in range(3):
            with scribbling(bad.pool.memory):
                bad.client.load(chain, bad.buffers())
        assert good.client.flush(LIMIT)
        for item in list(admin.list_objects(minio.bucket, recursive=True)):
            if names.page_key(item.object_name or ""):
                admin.remove_object(minio.bucket, item.object_name or "")
        good.spill(chain)
    with agent(tmp_path / "other", minio) as other:
        found, wrong = other.load(chain)
        assert len(found) == PAGES
        assert wrong == []


BLOCK = 4096


@pytest.mark.parametrize(
    "buffers",
    [
        pytest.param([[(0, 0, BLOCK)], [(0, 0, BLOCK)]], id="one buffer for two pages"),
        pytest.param([[(0, 0, BLOCK), (0, 0, BLOCK)]], id="twice in one page"),
        pytest.param([[(0, 0, BLOCK)], [(0, BLOCK - 1, BLOCK)]], id="by one byte"),
        pytest.param([[(0, 0, 4 * BLOCK)], [(0, BLOCK, BLOCK)]], id="one within another"),
        pytest.param([[(0, BLOCK, BLOCK)], [(0, 0, 4 * BLOCK)]], id="one around another"),
        pytest.param(
            [[(0, 2 * BLOCK, BLOCK)], [(0, 0, BLOCK)], [(0, 2 * BLOCK + 1, BLOCK)]],
            id="not next to each other",
        ),
        pytest.param([[(0, 0, BLOCK)], [(1, 0, BLOCK)]], id="two pools of one memory"),
    ],
)
def test_overlapping_buffers_are_refused(
    buffers: list[list[tuple[int, int, int]]], minio_config: MinioConfig, tmp_path: Path
) -> None:
    chain = make_chain(NAMESPACE, len(buffers))
    memory = HostPool(8, BLOCK, parts=1)
    with (
        agent(tmp_path, minio_config) as owner,
        RawClient(Path(owner.config.agent.socket)) as raw,
    ):
        raw.greet()
        for number in (0, 1):
            descriptor = os.dup(memory.descriptor)
            assert raw.ask(protocol.RegisterPool(number, memory.length), descriptor)
            os.close(descriptor)
        pages = [[Buffer(*one) for one in page] for page in buffers]
        hashes = b"".join(chain.hashes)
        for request in (
            protocol.SpillPages(chain.namespace, hashes, pages, b""),
            protocol.LoadPages(chain.namespace, hashes, pages),
        ):
            reply = raw.ask(request)
            assert isinstance(reply, protocol.Refused)
            assert "overlap" in reply.reason
            assert "\n" not in reply.reason
        side_by_side = [[Buffer(i % 2, i * BLOCK, BLOCK)] for i in range(len(buffers))]
        reply = raw.ask(protocol.LoadPages(chain.namespace, hashes, side_by_side))
        assert isinstance(reply, protocol.LoadedPages)
        assert set(reply.results) <= {LoadResult.MISSING, LoadResult.SKIPPED}
