"""Replay a trace through the tiers, without time, and count the hits of each tier."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from memkv_sglang.engine.promotion import Admission
from memkv_sglang.page import PageKey
from memkv_sglang.planning.disk import NAMESPACE, SimulatedDisk, page_hash
from memkv_sglang.planning.pool import LruPool
from memkv_sglang.planning.traces import Request, Trace

Placement = Literal["prefix_aware", "round_robin"]


_PAGE_BY_PAGE = 1_000_000
"""A trace whose prompts have at most this many pages in total is replayed page by page."""


class Tiers(NamedTuple):
    """Capacities in pages: of each node's pool and disk, and of the bucket."""

    host: float
    nvme: int
    minio: float
    promote: Literal["never", "second_use", "always"] = "second_use"


class Hits(NamedTuple):
    """Prompt pages by the tier that served them."""

    host: int
    nvme: int
    minio: int
    asked: int
    ideal: int
    """Number of hits if no page were ever evicted."""
    written: int
    """Number of pages written to the nodes' disks."""
    by_request: Sequence[int] = ()
    """Number of hits of each request."""

    @property
    def total(self) -> int:
        """Number of hits of all tiers."""
        return self.host + self.nvme + self.minio


class _Node(NamedTuple):
    host: LruPool
    disk: SimulatedDisk
    admission: Admission


def replay(
    trace: Trace,
    tiers: Tiers,
    *,
    nodes: int = 1,
    placement: Placement = "prefix_aware",
    run: int = 1,
) -> Hits:
    """Serve the requests one after the other. Uploads finish before the next request.

    Tiers evict `run` pages at a time. With 1, the result is exact.
    """
    homes = [
        _Node(LruPool(tiers.host, run), SimulatedDisk(tiers.nvme, run), Admission(tiers.promote))
        for _ in range(nodes)
    ]
    bucket, everything = LruPool(tiers.minio, run), LruPool(float("inf"), run)
    last_at: dict[int, int] = {}
    counts = [0, 0, 0]
    asked = ideal = 0
    by_request = []
    for number, request in enumerate(trace.requests):
        runs, pages = request.runs(run), request.pages
        node = number % nodes
        if placement == "prefix_aware" and nodes > 1:
            node = _follow(runs, last_at, node)
        ideal += everything.lookup(runs, pages)
        everything.store(runs, pages)
        parts = _serve(homes[node], bucket, runs, pages, run)
        counts = [a + b for a, b in zip(counts, parts, strict=True)]
        by_request.append(sum(parts))
        asked += pages
    written = sum(home.disk.written for home in homes)
    host, nvme, minio = counts
    return Hits(host, nvme, minio, asked, ideal, written, by_request)


def _follow(runs: Sequence[int], last_at: dict[int, int], turn: int) -> int:
    """Return the node that got the longest matching prefix, or the node `turn` if none did."""
    known = next((run for run in reversed(runs) if run in last_at), None)
    node = turn if known is None else last_at[known]
    last_at.update(dict.fromkeys(runs, node))
    return node


def _serve(
    home: _Node, bucket: LruPool, runs: Sequence[int], pages: int, run: int
) -> tuple[int, int, int]:
    """Return the hits in host pool, disk and bucket; store all other pages in each of them."""
    host = home.host.lookup(runs, pages)
    near = far = 0
    elsewhere = []
    if host < pages:
        home.disk.lookup(runs, pages)
        for i in range(host // run, len(runs)):
            skipped, wanted = max(0, host - i * run), min(run, pages - i * run)
            here = max(min(home.disk.size(runs[i]), wanted), skipped)
            there = max(min(bucket.size(runs[i]), wanted), here)
            near, far = near + here - skipped, far + there - here
            if there > here:
                elsewhere.append(runs[i])
            if there < wanted:
                break
    admitted = [
        number
        for number in elsewhere
        if home.admission.admits(PageKey(NAMESPACE, page_hash(number)))
    ]
    if admitted:
        home.disk.spill(admitted)
    home.disk.spill(runs, pages, (host + near + far) // run)
    home.host.store(runs, pages)
    bucket.store(runs, pages)
    return host, near, far


def run_of(trace: Trace) -> int:
    """Return the pages per run with which a replay is quick, which is 1 for traces of few pages."""
    asked = sum(request.pages for request in trace.requests)
    return 1 if asked < _PAGE_BY_PAGE else 32


def recorded_hits(requests: Sequence[Request]) -> int | None:
    """Return the hits at the time of recording; None if the trace does not contain them."""
    hits = [request.stored for request in requests]
    return None if None in hits else sum(hit for hit in hits if hit is not None)
