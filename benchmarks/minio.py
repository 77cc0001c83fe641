"""Compare the MinIO tier with wrk and with other clients."""

from contextlib import ExitStack
from datetime import timedelta
from functools import partial

from minio import Minio as MinioClient

from benchmarks.base import Options
from benchmarks.cpu import measure_cpu
from benchmarks.limits.wrk import wrk
from benchmarks.peers.base import CALL, Peer
from benchmarks.peers.on_minio import NAMES, open_on_minio
from benchmarks.peers.ours import Ours
from benchmarks.pool import HostPool
from benchmarks.report import Measure, Panel, Report
from benchmarks.servers import Minio, minio
from benchmarks.sizes import SIZES, Throughput, label
from benchmarks.visible import measure_visible
from memkv_sglang.config.schema import MIB, MinioConfig
from memkv_sglang.tiers.minio import MinioTier
from memkv_sglang.tiers.minio.names import ObjectNames

PAGES = tuple(SIZES)
ALL_PEERS = ("1m", "8m")
"""Page sizes for all peers. At other sizes, the only peer is SGLang's own backend."""

TLS_PAGES = ("1m", "8m")
LEAST, MOST = 128 * MIB, 512 * MIB
"""Limits of the bytes per measurement, which are otherwise those of one call (`CALL`).

With few large pages, the last of them do not share connections, which never happens in wrk.
"""

QUICK_TOTAL = 64 * MIB
SECONDS = 2
"""Seconds per measurement. A quick run takes one second for wrk and one call for the others.

Calls that load 128 MiB take 135 and 180 ms in turn, probably because the server collects garbage in
every second one. So a measurement must include many calls.
"""


def run(options: Options) -> Report:
    """Measure with the benchmark's own MinIO, with its data in `options.directory`.

    Raises `MissingToolError` without wrk or openssl.
    """
    report = Report("minio", "GB/s")
    repetitions = 1 if options.quick else options.repetitions
    with minio(options.directory) as server:
        for name in PAGES:
            peers = NAMES if name in ALL_PEERS else ("seaweedfs",)
            _measure(report, server, name, peers, repetitions, quick=options.quick)
        measure_cpu(report, server, repetitions)
        measure_visible(report, server, options.directory, repetitions)
    with minio(options.directory, tls=True) as server:
        for name in TLS_PAGES:
            _measure(report, server, f"{name}_tls", ("seaweedfs",), repetitions, options.quick)
    _claim(report)
    return report


def _measure(
    report: Report,
    server: Minio,
    case: str,
    peers: tuple[str, ...],
    repetitions: int,
    quick: bool,
) -> None:
    """Spill and load pages of one size with every contestant. `case` begins with that size."""
    size = SIZES[case.split("_")[0]]
    config = server.config(f"pages-{case}".replace("_", "-"))
    with ExitStack() as stack:
        count = (QUICK_TOTAL if quick else min(max(CALL * size, LEAST), MOST)) // size
        pool = stack.enter_context(HostPool(count, size, huge=True))
        pool.fill()
        contestants: dict[str, Peer] = {"memkv": Ours(MinioTier(config))}
        contestants |= open_on_minio(report, peers, config, pool)
        for peer in contestants.values():
            stack.callback(peer.close)
        runs = {name: Throughput(peer, pool) for name, peer in contestants.items()}
        seconds = 0 if quick else SECONDS
        loads: dict[str, Measure] = {
            "wrk": partial(wrk, presigned(config), config.connections, max(seconds, 1))
        }
        loads |= {name: partial(r.load, seconds) for name, r in runs.items()}
        report.compete(f"load {case}", loads, repetitions)
        report.compete(f"spill {case}", {n: r.spill for n, r in runs.items()}, repetitions)
        for finished in runs.values():
            finished.clear()


def presigned(config: MinioConfig) -> list[str]:
    """Return the URL of each page in the bucket."""
    scheme, _, host = config.endpoint.partition("://")
    client = MinioClient(
        host,
        access_key=config.access_key,
        secret_key=config.secret_key,
        secure=scheme == "https",
        cert_check=False,
        region=config.region,
    )
    names = [entry.object_name for entry in client.list_objects(config.bucket, recursive=True)]
    # An agent's probe objects come and go, so leave them out.
    is_page = ObjectNames(config.prefix).page_key
    return [
        client.presigned_get_object(config.bucket, name, expires=timedelta(hours=1))
        for name in names
        if name and is_page(name) is not None
    ]


def _claim(report: Report) -> None:
    for case, runs in report.runs.items():
        verb, _, size = case.partition(" ")
        if verb in ("load", "spill") and "memkv" in runs:
            for peer in runs.keys() - {"memkv"}:
                key = f"minio_{verb}_over_{peer.replace('-', '_')}_{size}"
                report.figures[key] = report.ratio(case, "memkv", peer)
    for verb in ("load", "spill"):
        cases = {label(name): f"{verb} {name}" for name in PAGES}
        report.panels.append(Panel(f"{verb}, http", "GB/s", cases))
    for verb in ("load", "spill"):
        cases = {label(name): f"{verb} {name}_tls" for name in TLS_PAGES}
        report.panels.append(Panel(f"{verb}, https", "GB/s", cases))
    report.panels += [
        Panel("client CPU, loads", "CPU s per GB", {"1 MiB": "cpu 1m"}),
        Panel("128 pages of 1 MiB until another node sees them", "s", {"1 MiB": "visible"}),
    ]
    report.notes.append("client and server share the machine's cores; the server uses most of them")
