"""Compare S3 servers: spill pages of 1 MiB to each of them in turn, and load them."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from memkv_testbed.minio_server import MinioServer
from memkv_testbed.other_servers import SeaweedServer, VersityServer
from memkv_testbed.s3_server import S3Server

from benchmarks.base import Options
from benchmarks.peers.ours import Ours
from benchmarks.pool import HostPool
from benchmarks.report import Report
from benchmarks.sizes import Throughput
from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.tiers.minio import MinioTier

SERVERS: dict[str, Callable[[Path], S3Server]] = {
    "minio": MinioServer,
    "seaweedfs": SeaweedServer,
    "versitygw": VersityServer,
    "versitygw-keep-alive": lambda directory: VersityServer(directory, keep_alive=True),
}
PAGES = 128
QUICK_PAGES = 32
SECONDS = 1.0
"""Seconds per measurement of loads."""


def run(options: Options) -> Report:
    """Start all servers, with their data in `options.directory`, and measure one at a time."""
    report = Report("s3", "GB/s")
    repetitions = 1 if options.quick else options.repetitions
    with ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(dir=options.directory, prefix="memkv-bench-")
        )
        pool = stack.enter_context(
            HostPool(QUICK_PAGES if options.quick else PAGES, MIB, huge=True)
        )
        pool.fill()
        runs = {}
        for name, make in SERVERS.items():
            server = stack.enter_context(make(Path(scratch) / name))
            peer = Ours(MinioTier(_config(server)))
            stack.callback(peer.close)
            runs[name] = Throughput(peer, pool)
            pool.fill()
        report.compete(
            "load 1m", {n: partial(r.load, SECONDS) for n, r in runs.items()}, repetitions
        )
        report.compete("spill 1m", {n: r.spill for n, r in runs.items()}, repetitions)
    for case in report.runs:
        for name in SERVERS.keys() - {"minio"}:
            key = f"s3_{case.split()[0]}_{name.replace('-', '_')}_over_minio"
            report.figures[key] = report.ratio(case, name, "minio")
    report.notes.append("client and servers share the machine's cores; one server works at a time")
    return report


def _config(server: S3Server) -> MinioConfig:
    return MinioConfig(
        endpoint=server.endpoint,
        bucket="pages",
        access_key=server.access_key,
        secret_key=server.secret_key,
    )
