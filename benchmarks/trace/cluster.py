"""Nodes that share a MinIO: what their disks write, and where hits come from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.trace.peers import Lru
from benchmarks.trace.product import ProductCache
from benchmarks.trace.requests import Requests, page_hash
from memkv_sglang.engine.admission import Promotions, SpillAdmission
from memkv_sglang.page import NAMESPACE_DIGEST_SIZE, PageKey

NODES = 4

Placement = Callable[[Requests], list[int]]
"""Chooses the node of each request."""


def round_robin(requests: Requests) -> list[int]:
    """Take the nodes in turn."""
    return [i % NODES for i in range(len(requests))]


def prefix_aware(requests: Requests) -> list[int]:
    """Follow the longest prefix that was sent to some node before; others go in turn."""
    home: dict[int, int] = {}
    nodes = []
    for i, request in enumerate(requests):
        known = [page for page in request if page in home]
        node = home[known[-1]] if known else i % NODES
        home.update(dict.fromkeys(request, node))
        nodes.append(node)
    return nodes


PLACEMENTS: dict[str, Placement] = {"round robin": round_robin, "prefix-aware": prefix_aware}


class Outcome(NamedTuple):
    """What a replay came to, in pages."""

    nvme_hits: int
    minio_hits: int
    written: int
    """Pages spilled and promoted to the nodes' disks."""

    @property
    def hits(self) -> int:
        """Return the hits of both tiers."""
        return self.nvme_hits + self.minio_hits


class _Node:
    """A node as the engine runs it: `admission` decides on spills, `promotions` on copies."""

    def __init__(self, pages: int, spills: str, promote: str) -> None:
        self.nvme = ProductCache(pages)
        self._admission = SpillAdmission(spills)
        self._promotions = Promotions(promote)

    def request(self, request: Sequence[int], shared: set[int]) -> tuple[int, int]:
        """Serve a prompt; return hits of the disk and of MinIO."""
        prefix = next((i for i, page in enumerate(request) if page not in shared), len(request))
        self.nvme.lookup(request)
        near = [page for page in request[:prefix] if page in self.nvme]
        far = [page for page in request[:prefix] if page not in self.nvme]
        self._admission.loaded(len(near), len(far))
        promoted = [page for page in far if self._promotions.admits(_key(page))]
        self.nvme.spill(promoted)
        fresh = request[prefix:]
        if self._admission.admits([_key(page) for page in fresh]):
            self.nvme.spill(fresh)
        shared.update(fresh)
        return len(near), len(far)


def replay(requests: Requests, pages: int, placement: Placement, spills: str, promote: str):
    """Replay with disks of `pages` pages on each node."""
    nodes = [_Node(pages, spills, promote) for _ in range(NODES)]
    shared: set[int] = set()
    near = far = 0
    for node, request in zip(placement(requests), requests, strict=True):
        hits = nodes[node].request(request, shared)
        near, far = near + hits[0], far + hits[1]
    return Outcome(near, far, sum(node.nvme.written for node in nodes))
