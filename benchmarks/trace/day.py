"""Run a day of a trace through real engines, in simulated time, and count its S3 requests.

The engines, tiers and collectors are the product's. Their clocks, and the server's, jump from one
request of the trace to the next. In between, each node's collector, log and pins run when they are
due.
"""

import heapq
import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from prometheus_client import CollectorRegistry
from rich.progress import track
from typing_extensions import override

from benchmarks.pool import HostPool
from benchmarks.trace.cluster import NODES
from benchmarks.trace.product import NAMESPACE
from benchmarks.trace.requests import Workload
from benchmarks.trace.simulated_s3 import SimulatedS3
from memkv_sglang.config.schema import (
    KIB,
    MIB,
    CollectorConfig,
    EngineConfig,
    MinioConfig,
    NvmeConfig,
)
from memkv_sglang.engine.engine import Engine
from memkv_sglang.engine.pins import REFRESH_INTERVAL
from memkv_sglang.metrics import Metrics
from memkv_sglang.page import Chain, PageKey
from memkv_sglang.planning.disk import page_hash
from memkv_sglang.tiers.base import LoadResult
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.http import ServerClock
from memkv_sglang.tiers.minio.retention import CollectorWorker, use_log, worker
from memkv_sglang.tiers.nvme import NvmeTier

PAGE = 4 * KIB
SLOT = 8 * KIB
"""Bytes of a page and its footer on the disk."""
SEGMENT = MIB
DAY = 86400.0
LOG_STEP = 10.0
"""Simulated seconds between two checks whether a node's log is due."""
WAIT = 120.0
"""Maximum real seconds for uploads to finish."""


class Day(NamedTuple):
    """The totals of a day."""

    requests: Counter[str]
    """Number of S3 requests by purpose."""
    hits: int
    """Pages loaded."""
    used: int
    """Pages of requests. A page counts once per period of the collector."""
    stored: int
    """Pages stored in the bucket. A page that was removed may be stored again."""
    removed: int
    """Pages removed from the bucket."""


class SimulatedTime:
    """Replaces the process's clocks with clocks that can be advanced. A context manager."""

    def __init__(self) -> None:
        """Start at the real time."""
        self._ahead = 0.0
        self._patches = ExitStack()
        self._turns: list[tuple[float, int, Callable[[], float]]] = []
        self._number = itertools.count()
        self.began = 0.0

    def __enter__(self) -> "SimulatedTime":
        wall, monotonic, clock = time.time, time.monotonic, time.clock_gettime
        replaced = {
            "time": lambda: wall() + self._ahead,
            "monotonic": lambda: monotonic() + self._ahead,
            "clock_gettime": lambda kind: clock(kind) + self._ahead,
        }
        for name, now in replaced.items():
            self._patches.enter_context(patch.object(time, name, now))
        # These defaults of arguments were bound to the real clocks earlier.
        clocks = (replaced["time"], *(ServerClock.__init__.__defaults__ or ())[1:])
        self._patches.enter_context(patch.object(ServerClock.__init__, "__defaults__", clocks))
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def repeat(self, turn: Callable[[], float]) -> None:
        """Call `turn` now, and then whenever it is due. It returns the time of its next call."""
        heapq.heappush(self._turns, (time.monotonic(), next(self._number), turn))

    def run_until(self, seconds: float) -> None:
        """Advance to this many seconds after the start. Make every call that is due on the way."""
        until = self.began + seconds
        while self._turns and self._turns[0][0] <= until:
            when, _, turn = heapq.heappop(self._turns)
            self._move(when)
            again = time.monotonic() + turn()
            heapq.heappush(self._turns, (again, next(self._number), turn))
        self._move(until)

    def _move(self, until: float) -> None:
        self._ahead += max(until - time.monotonic(), 0.0)


class _Tier(MinioTier):
    """A tier that writes no log when the replay waits for uploads; nodes do so once an interval."""

    @override
    def flush_accesses(self, timeout: float) -> bool:
        return True


class _Node:
    """An engine, and the work of its background threads."""

    def __init__(
        self, server: SimulatedS3, home: Path, disk: int, collector: CollectorConfig
    ) -> None:
        segments = -(-disk * SLOT // (SEGMENT - SLOT))
        nvme = NvmeTier(
            NvmeConfig(directory=str(home), capacity=segments * SEGMENT, segment_size=SEGMENT)
        )
        minio = MinioConfig(
            endpoint=server.endpoint, bucket="day", access_key="key", secret_key="secret-key"
        )
        self._server = server
        self._tier = _Tier(minio)
        self._tier.check(time.monotonic() + WAIT)
        metrics = Metrics(CollectorRegistry())
        self.engine = Engine(
            nvme, self._tier, nvme, EngineConfig(skip_slow_loads=False), metrics, self._tier
        )
        self._tier.keep_limits(collector, metrics)
        found = self._tier.retention._worker
        assert found is not None
        self._worker = found
        self._tier.access.support(time.monotonic() + WAIT)

    def turns(self) -> Sequence[Callable[[], float]]:
        """Return the functions that the node calls from time to time."""
        return self._collect, self._log, self._read_pins

    def _collect(self) -> float:
        with self._server.purpose("removal"):
            self._worker._look()
        return self._worker._pause()

    def _log(self) -> float:
        self._tier.retention.uses._step(flush=False)
        return LOG_STEP

    def _read_pins(self) -> float:
        with self._server.purpose("pins"):
            self._tier.read_pins()
        return REFRESH_INTERVAL

    def serve(self, request: Sequence[int], pool: HostPool) -> int:
        """Look a request up, load the hit and spill the rest; return the number of pages loaded."""
        hashes = [page_hash(page) for page in request]
        pages = pool.place([PageKey(NAMESPACE, one) for one in hashes])
        with self._server.purpose("lookup"):
            found = self.engine.lookup(Chain(NAMESPACE, hashes), budget=WAIT).length
        with self._server.purpose("load"):
            loads = self.engine.load(pages[:found]) if found else []
        good = itertools.takewhile(lambda load: load.result is LoadResult.LOADED, loads)
        loaded = sum(1 for _ in good)
        with self._server.purpose("spill"):
            self.engine.spill(pages[loaded:], hashes[:loaded])
            assert self.engine.flush(WAIT)
        return loaded


@contextmanager
def _no_background() -> Iterator[None]:
    """Keep the background threads of collectors and logs from working."""
    with (
        patch.object(CollectorWorker, "_run", lambda _: None),
        patch.object(worker, "SHARE", 1.0),
        patch.object(use_log, "WAKE_SECONDS", threading.TIMEOUT_MAX),
    ):
        yield


def replay(
    workload: Workload,
    placed: Sequence[int],
    disk: int,
    collector: CollectorConfig,
    home: Path,
    length: float = DAY,
) -> Day:
    """Replay `length` seconds on four nodes whose disks hold `disk` pages each."""
    hits, used = 0, set[tuple[int, int]]()
    requests = list(zip(workload.seconds, placed, workload.requests, strict=True))
    with (
        tempfile.TemporaryDirectory(dir=home, prefix="memkv-bench-") as scratch,
        SimulatedTime() as clock,
        SimulatedS3() as server,
        _no_background(),
        ExitStack() as stack,
        HostPool(max(map(len, workload.requests)), PAGE) as pool,
    ):
        nodes = []
        for number in range(NODES):
            node = _Node(server, Path(scratch, f"node-{number}"), disk, collector)
            stack.callback(node.engine.close, drain=0)
            nodes.append(node)
            for turn in node.turns():
                clock.repeat(turn)
        server.counts.clear()
        for seconds, place, request in track(requests, "replaying"):
            clock.run_until(seconds)
            hits += nodes[place].serve(request, pool)
            used.update((int(seconds // collector.use_period), page) for page in request)
        clock.run_until(length)
        return Day(Counter(server.counts), hits, len(used), server.stored, server.removed)
