"""A node for tests: its own agent, and host pools like SGLang's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from memkv_testbed.host_pool import HostPool
from memkv_testbed.processes import ending

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import MIB, AgentConfig, Config, MinioConfig, NvmeConfig
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.page import Buffer, Chain
from memkv_sglang.tiers.base import SpillResult

CALL_PAGES = 128
"""Pages per call, as many as SGLang hands over."""

LIMIT = 60.0
"""Seconds after which a test gives up waiting."""


class Node:
    """One machine of a cluster; `name` keeps its directories apart from other nodes'."""

    def __init__(
        self, name: str, home: Path, minio: MinioConfig, capacity: int = 512 * MIB
    ) -> None:
        home = home / name
        self.config = Config(
            agent=AgentConfig(socket=str(home / "run" / "agent.sock"), drain_timeout=1.0),
            nvme=NvmeConfig(directory=str(home / "pages"), capacity=capacity),
            minio=minio,
        )
        self.client = AgentClient(self.config, start=True)
        assert self.client.wait(LIMIT), self.client.problem

    def connect(self) -> AgentClient:
        """Return another client, like that of another server on the node."""
        client = AgentClient(self.config, start=False)
        assert client.wait(LIMIT), client.problem
        return client

    def restart(self) -> None:
        """Stop the agent and start it again on the same directory."""
        self.stop()
        self.client = AgentClient(self.config, start=True)
        assert self.client.wait(LIMIT), self.client.problem

    def stop(self) -> None:
        report = self.client.status()
        assert report is not None
        with ending(report.agent.pid):
            assert self.client.shutdown()
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.shutdown()
        self.client.close()


class Pool:
    """A host pool for the pages of a chain, and the client that moves them."""

    def __init__(self, client: AgentClient, chain: Chain, page_bytes: int) -> None:
        self._client = client
        self._chain = chain
        self._memory = HostPool(len(chain.hashes), page_bytes)
        self._number = client.register_pool(self._memory.descriptor, self._memory.length)

    def fill(self) -> None:
        """Write every page's content, which is derived from its key."""
        self._memory.fill(self._chain)

    def wrong(self, pages: int) -> list[int]:
        """Return the indices among the first `pages` pages whose content does not match their
        key.
        """
        return self._memory.wrong(Chain(self._chain.namespace, self._chain.hashes[:pages]))

    def spill(self) -> list[SpillResult]:
        results: list[SpillResult] = []
        for first, part, buffers in self._calls():
            results += self._client.spill(part, buffers, self._chain.hashes[:first])
        return results

    def load(self) -> list[PageLoad]:
        loads: list[PageLoad] = []
        for _, part, buffers in self._calls():
            loads += self._client.load(part, buffers)
        return loads

    def _calls(self) -> Iterator[tuple[int, Chain, list[list[Buffer]]]]:
        for first in range(0, len(self._chain.hashes), CALL_PAGES):
            hashes = self._chain.hashes[first : first + CALL_PAGES]
            places = range(first, first + len(hashes))
            buffers = self._memory.buffers(self._number, places)
            yield first, Chain(self._chain.namespace, hashes), buffers
