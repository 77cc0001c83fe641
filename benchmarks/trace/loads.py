"""Replay requests through real engines: four nodes with NVMe directories, and one MinIO.

Pages have 4 KiB.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from memkv_testbed.minio_server import MinioServer
from prometheus_client import CollectorRegistry

from benchmarks.pool import HostPool
from benchmarks.trace.cluster import NODES
from benchmarks.trace.product import NAMESPACE
from benchmarks.trace.requests import Workload
from memkv_sglang.config.schema import KIB, MIB, EngineConfig, MinioConfig, NvmeConfig
from memkv_sglang.engine.engine import Engine
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.planning.disk import page_hash
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.nvme import NvmeTier

_PAGE = 4 * KIB
_SLOT = 8 * KIB
"""Bytes of a page and its footer on the disk."""
_SEGMENT = MIB

Admission = Literal["always", "second_use"]


class Served(NamedTuple):
    """The result of a replay."""

    hits: int
    """Pages loaded."""
    ideal: int
    milliseconds: list[float]
    """Seconds of each load call."""


def serve(
    workload: Workload, placed: Sequence[int], pages: int, admission: Admission, home: Path
) -> Served:
    """Replay requests one after the other: look up, load the hit, spill the rest.

    Skips the part of a pause in which there is nothing left to do.
    """
    longest = max(map(len, workload.requests))
    arrivals = [*workload.seconds, workload.seconds[-1]]
    hits, times = 0, list[float]()
    with (
        tempfile.TemporaryDirectory(dir=home, prefix="memkv-bench-") as scratch,
        _engines(Path(scratch), pages, admission) as engines,
        HostPool(longest, _PAGE) as pool,
    ):
        for i, (node, request) in enumerate(zip(placed, workload.requests, strict=True)):
            loaded, seconds = _serve(engines[node], request, pool)
            hits += loaded
            if loaded:
                times.append(seconds * 1e3)
            _pause(engines, arrivals[i + 1] - arrivals[i])
    return Served(hits, workload.ideal_hits, times)


def _pause(engines: Sequence[Engine], seconds: float) -> None:
    """Wait until the trace's next request, or until no page waits for upload."""
    deadline = time.monotonic() + seconds
    for engine in engines:
        engine.flush(max(0.0, deadline - time.monotonic()))


def _serve(engine: Engine, request: Sequence[int], pool: HostPool) -> tuple[int, float]:
    """Return the number of loaded pages, and the duration."""
    hashes = [page_hash(page) for page in request]
    pages = pool.place([PageKey(NAMESPACE, page_hash) for page_hash in hashes])
    found = engine.lookup(Chain(NAMESPACE, hashes)).length
    began = time.perf_counter()
    loads = engine.load(pages[:found]) if found else []
    seconds = time.perf_counter() - began
    good = itertools.takewhile(lambda load: load.result is LoadResult.LOADED, loads)
    loaded = sum(1 for _ in good)
    engine.spill(pages[loaded:], hashes[:loaded])
    return loaded, seconds


@contextmanager
def _engines(home: Path, pages: int, admission: Admission) -> Iterator[list[Engine]]:
    segments = -(-pages * _SLOT // (_SEGMENT - _SLOT))
    with ExitStack() as stack:
        server = stack.enter_context(MinioServer(home / "minio"))
        minio = MinioConfig(
            endpoint=server.endpoint,
            bucket="trace",
            access_key=server.access_key,
            secret_key=server.secret_key,
        )
        engines = []
        for node in range(NODES):
            nvme = NvmeTier(
                NvmeConfig(
                    directory=str(home / f"node-{node}"),
                    capacity=segments * _SEGMENT,
                    segment_size=_SEGMENT,
                )
            )
            config = EngineConfig(admission=admission)
            metrics = Metrics(CollectorRegistry())
            engines.append(Engine(nvme, MinioTier(minio), nvme, config, metrics))
            stack.callback(engines[-1].close, drain=0)
        yield engines
