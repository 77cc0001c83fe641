"""One node of the demo: an agent of its own, and a host pool like SGLang's."""

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

from memkv_sglang.client.client import AgentClient
from memkv_sglang.config.schema import GIB, AgentConfig, Config, MinioConfig, NvmeConfig
from memkv_sglang.engine.results import PageLoad
from memkv_sglang.namespace import Namespace
from memkv_sglang.page import Buffer, Chain, PageKey
from memkv_sglang.testing.pages import page_content
from memkv_sglang.tiers.base import SpillResult

CALL_PAGES = 128
"""Pages of a call; SGLang hands over as many."""

START_SECONDS = 30.0


class Node:
    """A node with a directory for its pages, its agent, and memory for a chain."""

    def __init__(self, name: str, home: Path, minio: MinioConfig, namespace: Namespace) -> None:
        """Prepare; `home` gets the socket's and the pages' directory."""
        self.name = name
        self.namespace = namespace
        self._config = Config(
            agent=AgentConfig(socket=str(home / name / "run" / "agent.sock")),
            nvme=NvmeConfig(directory=str(home / name / "pages"), capacity=2 * GIB),
            minio=minio,
        )
        self.client: AgentClient | None = None

    def start(self) -> None:
        """Start the agent and wait until it serves. Raises `RuntimeError`."""
        self.client = AgentClient(self._config, start=True)
        if not self.client.wait(START_SECONDS):
            raise RuntimeError(f"{self.name}: {self.client.problem}")
        self.client.describe(self.namespace)

    def stop(self) -> None:
        """End the agent, which keeps what it was given; idempotent."""
        if self.client is not None:
            self.client.shutdown()
            self.client.close()
            self.client = None


class Pool:
    """Memory for the pages of one chain, known to a node's agent."""

    def __init__(self, node: Node, chain: Chain) -> None:
        """Take the memory and let the agent map it."""
        self._chain = chain
        self._page = node.namespace.page_bytes
        assert node.client is not None
        self._client = node.client
        length = self._page * len(chain.hashes)
        descriptor = os.memfd_create("memkv-demo-pool", os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, length)
            self._memory = mmap.mmap(descriptor, length)
            self._number = self._client.register_pool(descriptor, length)
        finally:
            os.close(descriptor)

    def fill(self) -> None:
        """Write every page's content; it follows from the page's key."""
        for at, key in self._places():
            self._memory[at : at + self._page] = page_content(key, self._page)

    def wrong_pages(self) -> int:
        """Return how many pages do not hold, byte for byte, what their key demands."""
        return sum(
            self._memory[at : at + self._page] != page_content(key, self._page)
            for at, key in self._places()
        )

    def _places(self) -> Sequence[tuple[int, PageKey]]:
        return [(i * self._page, key) for i, key in enumerate(self._chain.keys())]

    def spill(self) -> tuple[list[SpillResult], float]:
        """Spill the chain, in calls as SGLang makes them; with the seconds it took."""
        began = time.perf_counter()
        results: list[SpillResult] = []
        for first, part, buffers in self._calls():
            parent = self._chain.hashes[first - 1] if first else b""
            results += self._client.spill(part, buffers, parent)
        return results, time.perf_counter() - began

    def load(self) -> tuple[list[PageLoad], float]:
        """Load the chain likewise."""
        began = time.perf_counter()
        loads: list[PageLoad] = []
        for _, part, buffers in self._calls():
            loads += self._client.load(part, buffers)
        return loads, time.perf_counter() - began

    def _calls(self) -> Sequence[tuple[int, Chain, list[list[Buffer]]]]:
        calls = []
        for first in range(0, len(self._chain.hashes), CALL_PAGES):
            part = Chain(self._chain.namespace, self._chain.hashes[first : first + CALL_PAGES])
            buffers = [
                [Buffer(self._number, (first + i) * self._page, self._page)]
                for i in range(len(part.hashes))
            ]
            calls.append((first, part, buffers))
        return calls
