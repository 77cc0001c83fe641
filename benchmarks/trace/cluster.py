"""Simulate nodes that share a MinIO: how much their disks write, and where hits come from."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from benchmarks.trace.peers import Lru
from benchmarks.trace.product import NAMESPACE
from benchmarks.trace.requests import Requests
from memkv_sglang.engine.promotion import Admission
from memkv_sglang.page import PageKey
from memkv_sglang.planning.disk import page_hash

NODES = 4


def round_robin(requests: Requests) -> list[int]:
    """Send requests to the nodes in turn."""
    return [i % NODES for i in range(len(requests))]


def prefix_aware(requests: Requests) -> list[int]:
    """Send a request to the node that got its longest prefix; if none did, to the next one."""
    home: dict[int, int] = {}
    nodes = []
    for i, request in enumerate(requests):
        known = [page for page in request if page in home]
        node = home[known[-1]] if known else i % NODES
        home.update(dict.fromkeys(request, node))
        nodes.append(node)
    return nodes


PLACEMENTS: dict[str, Callable[[Requests], list[int]]] = {
    "round robin": round_robin,
    "prefix-aware": prefix_aware,
}
"""Routers. Each returns a node for every request."""


class Disk(Protocol):
    """The interface of a node's disk."""

    written: int
    """Number of pages written to the disk."""

    def lookup(self, pages: Sequence[int], /) -> int:
        """Use the stored prefix; return its length."""

    def spill(self, pages: Sequence[int], /) -> int:
        """Write the missing pages; return how many there were."""

    def __contains__(self, page: int, /) -> bool: ...


class LruDisk(Lru):
    """A disk with plain LRU eviction."""

    written = 0

    def lookup(self, pages: Sequence[int]) -> int:
        """See `Disk`."""
        length = next((i for i, page in enumerate(pages) if page not in self), len(pages))
        for page in reversed(pages[:length]):
            self.use(page)
        return length

    def spill(self, pages: Sequence[int]) -> int:
        """See `Disk`."""
        before = self.written
        for page in reversed(pages):
            self.written += page not in self
            self.use(page)
        return self.written - before


class Rules(NamedTuple):
    """Decides which pages are written to a node's disk."""

    spills: bool
    """Whether to write all spilled pages (`engine.admission = "always"`)."""
    promote: Literal["never", "second_use", "always"]
    """When to write pages that were loaded from MinIO, as in `engine.promote`."""


WRITE_EVERYTHING = Rules(spills=True, promote="always")
SECOND_USE = Rules(spills=False, promote="always")
"""`engine.admission = "second_use"`: the spill counts as the first use."""


class Outcome(NamedTuple):
    """The result of a replay, in pages."""

    nvme_hits: int
    minio_hits: int
    written: int
    """Pages that were spilled or promoted to the nodes' disks."""

    @property
    def hits(self) -> int:
        """Return the hits of both tiers."""
        return self.nvme_hits + self.minio_hits


def replay(
    requests: Requests, placed: Sequence[int], pages: int, rules: Rules, disk: type[Disk]
) -> Outcome:
    """Replay with a disk of `pages` pages per node. MinIO has every page at once."""
    disks = [disk(pages) for _ in range(NODES)]  # type: ignore[call-arg]  # both take the size
    admissions = [Admission(rules.promote) for _ in range(NODES)]
    shared: set[int] = set()
    near = far = 0
    for node, request in zip(placed, requests, strict=True):
        length = next((i for i, page in enumerate(request) if page not in shared), len(request))
        disks[node].lookup(request[:length])
        elsewhere = [page for page in request[:length] if page not in disks[node]]
        near, far = near + length - len(elsewhere), far + len(elsewhere)
        keys = (PageKey(NAMESPACE, page_hash(page)) for page in elsewhere)
        admitted = [admissions[node].admits(key) for key in keys]
        disks[node].spill([p for p, admit in zip(elsewhere, admitted, strict=True) if admit])
        if rules.spills:
            disks[node].spill(request[length:])
        shared.update(request[length:])
    return Outcome(near, far, sum(disk.written for disk in disks))
