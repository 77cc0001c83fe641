"""Lookups on the disk's index: nothing but memory."""

import tempfile
import time

from benchmarks.base import Options
from benchmarks.pool import HostPool
from benchmarks.report import Report
from memkv_sglang.config.schema import GIB, KIB, NvmeConfig
from memkv_sglang.page import Chain
from memkv_sglang.testing.pages import make_hashes, make_namespace
from memkv_sglang.tiers.nvme import NvmeTier

CHAIN = 2048


def run(options: Options) -> Report:
    """Measure lookups of a chain that is there, to its end and to its middle."""
    report = Report("lookup", "ms")
    namespace = make_namespace(page_bytes=4 * KIB)
    hashes = make_hashes(CHAIN, "lookup")
    diverging = [*hashes[: CHAIN // 2], *make_hashes(CHAIN // 2, "elsewhere")]
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-") as scratch:
        tier = NvmeTier(NvmeConfig(directory=scratch, capacity=GIB))
        try:
            with HostPool(CHAIN, 4 * KIB) as pool:
                tier.spill(
                    pool.place(Chain(namespace.digest, hashes).keys()), time.monotonic() + 60
                )

            def look(chain: Chain, length: int) -> float:
                began = time.perf_counter()
                found = tier.lookup(chain, time.monotonic() + 1)
                elapsed = time.perf_counter() - began
                assert found == (length, True)
                return elapsed * 1e3

            contestants = {
                "all present": lambda: look(Chain(namespace.digest, hashes), CHAIN),
                "half present": lambda: look(Chain(namespace.digest, diverging), CHAIN // 2),
            }
            report.compete("2048 pages", contestants, options.repetitions * 10)
        finally:
            tier.close()
    report.figures["nvme_lookup_2048_ms"] = report.median("2048 pages", "all present")
    return report
