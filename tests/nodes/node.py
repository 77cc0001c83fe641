"""A node as tests see it: an agent of its own, and host pools like SGLang's."""

import mmap
import os
import select
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import MIB, AgentConfig, Config, MinioConfig, NvmeConfig
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.testing.pages import page_content
from memkv_sglang.tiers.base import SpillResult

CALL_PAGES = 128
"""Pages of a call; SGLang hands over as many."""

LIMIT = 60.0
"""Seconds after which a test gives up waiting."""


class Node:
    """One machine of a cluster; `name` keeps its directories apart from other nodes'."""

    def __init__(
        self, name: str, home: Path, minio: MinioConfig, capacity: int = 512 * MIB
    ) -> None:
        home = home / name
        self.config = Config(
            agent=AgentConfig(socket=str(home / "run" / "agent.sock"), drain=1.0),
            nvme=NvmeConfig(directory=str(home / "pages"), capacity=capacity),
            minio=minio,
        )
        self.client = AgentClient(self.config, start=True)
        assert self.client.wait(LIMIT), self.client.problem

    def connect(self) -> AgentClient:
        """Return a further client, as another server of the node would have it."""
        client = AgentClient(self.config, start=False)
        assert client.wait(LIMIT), client.problem
        return client

    def restart(self) -> None:
        """End the agent and start it again over the same directory."""
        self.stop()
        self.client = AgentClient(self.config, start=True)
        assert self.client.wait(LIMIT), self.client.problem

    def stop(self) -> None:
        report = self.client.status()
        assert report is not None
        pidfd = os.pidfd_open(report.agent.pid)
        try:
            assert self.client.shutdown()
            self.client.close()
            _wait_for(pidfd)
        finally:
            os.close(pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.shutdown()
        self.client.close()


def _wait_for(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(LIMIT * 1000), "the agent did not end"


class Pool:
    """Shared memory for a chain's pages, each in `parts` buffers that lie apart."""

    def __init__(self, client: AgentClient, chain: Chain, page_bytes: int, parts: int = 2) -> None:
        self._client = client
        self._chain = chain
        self._part = page_bytes // parts
        self._parts = parts
        length = self._part * parts * len(chain.hashes)
        descriptor = os.memfd_create("test-pool", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, length)
            self._memory = mmap.mmap(descriptor, length)
            self._number = client.register_pool(descriptor, length)
        finally:
            os.close(descriptor)

    def fill(self) -> None:
        """Write every page's content, which follows from its key."""
        for i, key in enumerate(self._chain.keys()):
            content = page_content(key, self._part * self._parts)
            for j, at in enumerate(self._places(i)):
                self._memory[at : at + self._part] = content[j * self._part : (j + 1) * self._part]

    def wrong(self, pages: int) -> list[int]:
        """Return which of the first `pages` pages do not hold what their key demands."""
        return [
            i
            for i, key in enumerate(self._chain.keys()[:pages])
            if b"".join(self._memory[at : at + self._part] for at in self._places(i))
            != page_content(key, self._part * self._parts)
        ]

    def spill(self) -> list[SpillResult]:
        results: list[SpillResult] = []
        for first, part, buffers in self._calls():
            parent = self._chain.hashes[first - 1] if first else b""
            results += self._client.spill(part, buffers, parent)
        return results

    def load(self) -> list[PageLoad]:
        loads: list[PageLoad] = []
        for _, part, buffers in self._calls():
            loads += self._client.load(part, buffers)
        return loads

    def _calls(self) -> Sequence[tuple[int, Chain, list[list[Buffer]]]]:
        hashes = self._chain.hashes
        return [
            (
                first,
                Chain(self._chain.namespace, hashes[first : first + CALL_PAGES]),
                [self._buffers(i) for i in range(first, min(first + CALL_PAGES, len(hashes)))],
            )
            for first in range(0, len(hashes), CALL_PAGES)
        ]

    def _buffers(self, index: int) -> list[Buffer]:
        return [Buffer(self._number, at, self._part) for at in self._places(index)]

    def _places(self, index: int) -> list[int]:
        region = self._part * len(self._chain.hashes)
        return [region * j + index * self._part for j in range(self._parts)]
