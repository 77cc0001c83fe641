"""Simulate the rules of `engine.upload` on four nodes with disks and a shared tier."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from benchmarks.trace.cluster import NODES
from benchmarks.trace.product import NAMESPACE, ProductCache
from benchmarks.trace.requests import Requests
from memkv_sglang.engine.promotion import Admission
from memkv_sglang.engine.uploads import DEFERRED_SHARE, UploadRule
from memkv_sglang.page import PageKey
from memkv_sglang.planning.disk import page_hash

RULES: Sequence[UploadRule] = get_args(UploadRule)


class Outcome(NamedTuple):
    """The result of a replay, in pages."""

    hits: int
    puts: int


class Nodes:
    """Four nodes with a disk each, and the shared tier that they upload pages to."""

    def __init__(self, pages: int, rule: UploadRule) -> None:
        """Give each node an empty disk of `pages` pages."""
        self.puts = 0
        """Pages uploaded."""
        self._rule = rule
        self._limit = DEFERRED_SHARE * pages
        self._disks = [ProductCache(pages) for _ in range(NODES)]
        self._admissions = [Admission("second_use") for _ in range(NODES)]
        self._deferred: list[deque[int]] = [deque() for _ in range(NODES)]
        self._shared: set[int] = set()

    def serve(self, node: int, request: Sequence[int]) -> int:
        """Load the stored prefix on a node and spill the rest; return the length of the prefix."""
        disk = self._disks[node]
        held = (page in disk or page in self._shared for page in request)
        hits = next((i for i, here in enumerate(held) if not here), len(request))
        prefix, rest = request[:hits], request[hits:]
        disk.lookup(prefix)
        if self._rule == "second_use":
            self._upload(page for page in prefix if page in disk)
        self._promote(node, [page for page in prefix if page not in disk])
        fresh = [page for page in rest if page not in disk]
        disk.spill(rest)
        stored = [page for page in fresh if page in disk]
        self._upload(page for page in fresh if page not in disk)  # as if the disk refused them
        if self._rule == "always":
            self._upload(stored)
        elif self._rule == "before_eviction":
            self._defer(node, [page for page in stored if page not in self._shared])
        return hits

    def _promote(self, node: int, pages: Sequence[int]) -> None:
        admits = self._admissions[node].admits
        keys = [PageKey(NAMESPACE, page_hash(page)) for page in pages]
        self._disks[node].spill([p for p, key in zip(pages, keys, strict=True) if admits(key)])

    def _defer(self, node: int, pages: Sequence[int]) -> None:
        disk, deferred = self._disks[node], self._deferred[node]
        deferred.extend(pages)
        disk.exempt.update(pages)
        while len(deferred) > self._limit:
            page = deferred.popleft()
            disk.exempt.discard(page)
            self._upload([page])

    def _upload(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page not in self._shared:
                self._shared.add(page)
                self.puts += 1


def replay(requests: Requests, placed: Sequence[int], pages: int, rule: UploadRule) -> Outcome:
    """Replay with a disk of `pages` pages per node. Uploads take no time."""
    nodes = Nodes(pages, rule)
    hits = sum(nodes.serve(node, request) for node, request in zip(placed, requests, strict=True))
    return Outcome(hits, nodes.puts)
