"""Measure lookups in the NVMe index and in MinIO, by chain length and cached presence."""

import math
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.base import Options
from benchmarks.distance import Distance
from benchmarks.peers.base import CALL, Peer
from benchmarks.peers.on_minio import open_on_minio
from benchmarks.peers.ours import Ours
from benchmarks.pool import HostPool
from benchmarks.report import Panel, Report
from benchmarks.servers import Minio, minio
from memkv_sglang.config.schema import GIB, KIB, MinioConfig, NvmeConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.nvme import NvmeTier

LENGTHS = (16, 128, 512, 2048, 4096)
QUICK_LENGTHS = (16, 2048)
CLAIMED = 2048
PAGE = 4 * KIB
"""Bytes per page. Few, because only presence matters."""

TTL = 60.0
"""Negative TTL in seconds for a warm tier, long enough that misses stay cached."""

ROUND_TRIP = 0.05
"""Round trip to the remote server in seconds. It is so long that the time of a lookup, divided by
it, is the number of round trips."""

NAMESPACE = make_namespace(page_bytes=PAGE)


def run(options: Options) -> Report:
    """Store one chain in both tiers and with `seaweedfs`, then look up prefixes of it."""
    report = Report("lookup", "ms")
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    repetitions = options.repetitions * (2 if options.quick else 4)
    hashes = make_hashes(max(lengths), "lookup")
    with ExitStack() as stack:
        pool = stack.enter_context(HostPool(max(lengths), PAGE))
        scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory))
        server = stack.enter_context(minio(options.directory))
        nvme = Ours(NvmeTier(NvmeConfig(directory=scratch, capacity=GIB)))
        stack.callback(nvme.close)
        config = server.config("lookup", negative_ttl=TTL)
        warm = Ours(MinioTier(config))
        stack.callback(warm.close)
        peers = open_on_minio(report, ("seaweedfs",), config, pool)
        for peer in peers.values():
            stack.callback(peer.close)
        for store in (nvme, warm, *peers.values()):
            _store(store, pool, hashes)
        bench = _Bench(report, config, nvme, warm, hashes)
        for length in lengths:
            for share in (1.0, 0.5, 0.0):
                bench.compare(length, share, repetitions)
        bench.random_boundary(peers, repetitions, 1 if options.quick else 3)
        _count_trips(report, server, hashes[:CLAIMED], 2 if options.quick else 5)
    _claim(report, lengths)
    return report


class _Bench:
    """A stored chain, and tiers whose presence cache is warm or cold."""

    def __init__(
        self, report: Report, config: MinioConfig, nvme: Peer, warm: Peer, hashes: list[bytes]
    ) -> None:
        self._report = report
        self._config = config
        self._nvme = nvme
        self._warm = warm
        self._hashes = hashes

    def compare(self, length: int, share: float, repetitions: int) -> None:
        """Look up a chain of which only the first part, `share`, is stored."""
        present = int(length * share)
        chain = _chain(self._hashes, length, present)
        case = f"{length} pages, {share:.0%} there"
        _look(self._warm, chain, present)
        for _ in range(repetitions):
            self._report.record(case, "memkv nvme", _look(self._nvme, chain, present))
            self._report.record(case, "memkv minio, known", _look(self._warm, chain, present))
            with _ignorant(self._config) as cold:
                self._report.record(case, "memkv minio, unknown", _look(cold, chain, present))

    def random_boundary(self, peers: dict[str, Peer], repetitions: int, peers_too: int) -> None:
        """Look up chains with a random boundary and a cold cache; peers only in some rounds.

        From round to round, the boundary moves from the beginning of the chain to its end. A peer's
        time is proportional to its position, so a few evenly spread rounds are fair.
        """
        for number in range(repetitions):
            present = int((number + random.random()) / repetitions * (CLAIMED + 1))
            chain = _chain(self._hashes, CLAIMED, present)
            with _ignorant(self._config) as cold:
                self._report.record("random", "memkv", _look(cold, chain, present))
            if number in _middles(repetitions, peers_too):
                for name, peer in peers.items():
                    self._report.record("random", name, _look(peer, chain, present))
                    peer.cool()


def _middles(rounds: int, count: int) -> set[int]:
    """Return the numbers of `count` evenly spread rounds."""
    return {(2 * i + 1) * rounds // (2 * count) for i in range(count)}


def _count_trips(report: Report, server: Minio, hashes: list[bytes], repetitions: int) -> None:
    """Look up chains over a long network path, and record the time in round trips."""
    with Distance(server.server.endpoint, ROUND_TRIP) as far:
        config = server.config("lookup", endpoint=far.endpoint, negative_ttl=TTL)
        for _ in range(repetitions):
            with _ignorant(config) as tier:
                nothing = _chain([], CLAIMED, 0)
                first = _look(tier, nothing, 0)
                again = _look(tier, nothing, 0)
            present = random.randrange(CLAIMED + 1)
            with _ignorant(config) as tier:
                somewhere = _look(tier, _chain(hashes, CLAIMED, present), present)
            for what, taken in {
                "memkv, first miss": first,
                "memkv, repeated miss": again,
                "memkv, random boundary": somewhere,
            }.items():
                report.record("round trips", what, taken / (ROUND_TRIP * 1e3))


@contextmanager
def _ignorant(config: MinioConfig) -> Iterator[Peer]:
    """Yield a connected tier with an empty presence cache."""
    tier = Ours(MinioTier(config))
    try:
        # This also opens the connections, because it sends as many HEADs at once as a search.
        tier.lookup(Chain(NAMESPACE.digest, make_hashes(CLAIMED, f"{random.random()}")))
        yield tier
    finally:
        tier.close()


def _chain(hashes: list[bytes], length: int, present: int) -> Chain:
    """Return a chain of `length` pages that diverges from `hashes` after `present` pages."""
    there = hashes[:present]
    elsewhere = make_hashes(length - present, f"{random.random()}", there[-1] if there else b"")
    return Chain(NAMESPACE.digest, [*there, *elsewhere])


def _store(peer: Peer, pool: HostPool, hashes: list[bytes]) -> None:
    pages = pool.place(Chain(NAMESPACE.digest, hashes).keys())
    for first in range(0, len(pages), CALL):
        peer.spill(pages[first : first + CALL])


def _look(peer: Peer, chain: Chain, present: int) -> float:
    """Return the milliseconds that a lookup takes."""
    began = time.perf_counter()
    found = peer.lookup(chain)
    elapsed = time.perf_counter() - began
    assert found == present, (found, present)
    return elapsed * 1e3


def _claim(report: Report, lengths: tuple[int, ...]) -> None:
    half, whole = f"{CLAIMED} pages, 50% there", f"{CLAIMED} pages, 100% there"
    figures = report.figures
    figures["lookup_minio_2048_cold_ms"] = report.median("random", "memkv")
    figures["lookup_minio_2048_warm_ms"] = report.median(half, "memkv minio, known")
    figures["lookup_nvme_2048_ms"] = report.median(whole, "memkv nvme")
    if "seaweedfs" in report.runs["random"]:
        ratio = report.ratio("random", "memkv", "seaweedfs")
        figures["lookup_minio_2048_cold_over_seaweedfs"] = ratio
    trips = {
        "lookup_miss_round_trips": "memkv, first miss",
        "lookup_repeated_miss_round_trips": "memkv, repeated miss",
        "lookup_2048_cold_round_trips": "memkv, random boundary",
    }
    for key, what in trips.items():
        # Rounding removes the CPU time of client and server, which is far less than half a round
        # trip.
        figures[key] = math.floor(report.median("round trips", what) + 0.5)
    for share in ("100%", "50%", "0%"):
        cases = {str(n): f"{n} pages, {share} there" for n in lengths}
        report.panels.append(
            Panel(f"chain length in pages, {share} stored", "ms", cases, lines=True, log=True)
        )
    random_case = {f"{CLAIMED} pages": "random"}
    report.panels.append(Panel("random boundary, cold presence cache", "ms", random_case, log=True))
    trip_title = f"round trips to a server {ROUND_TRIP * 1e3:.0f} ms away"
    report.panels.append(Panel(trip_title, "round trips", {"2048 pages": "round trips"}))
